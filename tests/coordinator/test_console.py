"""The console: what it shows, to whom, and who may change something from it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from coordinator.console.watch import FLOW_S, WINDOW_S, ConsoleWatch
from coordinator.fleet import Fleet
from coordinator.report import Report
from pdserve.core.errors import ConfigError, Overloaded
from pdserve.core.ids import RequestId
from pdserve.core.messages import FinishReason, Role, Undrain
from pdserve.core.security_settings import SecuritySettings
from tests.coordinator.test_api_keys import KEYS, TEXT
from tests.support.certificates import Authority
from tests.support.deployment import Deployed, deployed, scenario
from tests.support.registry_world import World


async def ask(system: Deployed, path: str, *, post: bool = False, **headers: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession(headers=headers) as session:
        call = session.post if post else session.get
        async with call(system.console + path) as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            json = answer.content_type == "application/json"
            return answer.status, await answer.json() if json else await answer.text()


def _draining(system: Deployed) -> set[str]:
    return {worker.id for worker in system.coordinator.snapshot().workers if worker.draining}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name][0]}"}


@scenario
async def test_the_page_and_its_parts_come_from_the_service_alone(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        status, page = await ask(system, "")
        assert status == 200
        for part in ("console.js", "console.css"):
            assert part in page
            assert (await ask(system, part))[0] == 200
        assert "//" not in page
        assert (await ask(system, "../service.py"))[0] == 404


@scenario
async def test_the_state_has_workers_requests_and_targets(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        await system.client.generate("hello", max_tokens=4, sla_class="interactive", ttft_target_ms=60_000)
        await system.client.generate("hello", max_tokens=4, sla_class="interactive", ttft_target_ms=0.001)
        status, state = await ask(system, "api/state")
        assert status == 200
        roles = {worker["id"]: (worker["role"], worker["standing"]) for worker in state["workers"]}
        assert roles == {"prefill-0": ("prefill", "up"), "decode-0": ("decode", "up")}
        (row,) = state["classes"]
        assert (row["class"], row["requests"], row["failed"], row["ttft"]) == ("interactive", 2, 0, [1, 1])
        assert [one["outcome"] for one in state["recent"]] == ["length", "length"]
        assert state["flows"] == [{"from": "prefill-0", "to": "decode-0", "bytes_per_s": 2 * 4096 / FLOW_S}]
        assert state["rights"] == {"keys": False}


@scenario
async def test_a_requests_story_is_found_by_its_id(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        await system.client.generate("hello", max_tokens=4, request_id="mine")
        status, story = await ask(system, "api/requests/mine")
        assert status == 200
        assert (story["request"], story["output_tokens"], story["outcome"]) == ("mine", 4, "length")
        assert (await ask(system, "api/requests/last"))[1]["request"] == "mine"
        status, error = await ask(system, "api/requests/other")
        assert status == 404
        assert "other" in error["error"]


@scenario
async def test_without_keys_nothing_can_be_changed(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        status, error = await ask(system, "api/workers/decode-0/drain", post=True)
        assert status == 403
        assert "api_keys_file" in error["error"]
        assert not any(worker.draining for worker in system.coordinator.snapshot().workers)


@scenario
async def test_without_keys_another_name_for_this_machine_is_turned_away(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        assert (await ask(system, "api/state", Host="evil.example"))[0] == 403
        assert (await ask(system, "api/state", Host="localhost"))[0] == 200


@scenario
async def test_with_keys_looking_and_acting_want_their_scopes(tmp_path: Path) -> None:
    async with deployed(tmp_path, decode=2, keys=TEXT) as system:
        assert (await ask(system, ""))[0] == 200
        assert (await ask(system, "api/state"))[0] == 401
        assert (await ask(system, "api/state", **bearer("anyone")))[0] == 403
        assert (await ask(system, "api/state", **bearer("watcher")))[0] == 200
        drain = "api/workers/decode-1/drain"
        assert (await ask(system, drain, post=True, **bearer("watcher")))[0] == 403
        assert (await ask(system, drain, post=True, **bearer("boss")))[0] == 200
        assert _draining(system) == {"decode-1"}
        assert (await ask(system, "api/workers/decode-1/undrain", post=True, **bearer("boss")))[0] == 200
        await system.worker("decode-1").until(Undrain)
        for wrong in ("api/workers/decode-9/drain", "api/workers/decode-1/explode"):
            assert (await ask(system, wrong, post=True, **bearer("boss")))[0] == 400


@scenario
async def test_a_role_can_be_changed(tmp_path: Path) -> None:
    async with deployed(tmp_path, decode=2, keys=TEXT) as system:
        assert (await ask(system, "api/workers/decode-1/flip", post=True, **bearer("boss")))[0] == 200
        worker = next(
            w
            for w in (await ask(system, "api/state", **bearer("boss")))[1]["workers"]
            if w["id"] == "decode-1"
        )
        assert worker["standing"] == "becoming prefill" or worker["role"] == Role.PREFILL


@scenario
async def test_it_does_not_open_to_others_without_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_keys_file"):
        async with deployed(tmp_path, console_host="0.0.0.0"):
            pass


@scenario
async def test_it_can_be_left_out(tmp_path: Path) -> None:
    async with deployed(tmp_path, console_port=None) as system:
        assert system.console == ""


@scenario
async def test_with_a_certificate_it_is_served_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    pair = authority.issue("server")
    security = SecuritySettings(tls_cert_file=str(pair.cert), tls_key_file=str(pair.key))
    async with deployed(tmp_path, security=security, prefill=0, decode=0) as system:
        assert system.console.startswith("https://")


@scenario
async def test_a_renewed_certificate_is_shown_at_the_next_handshake_and_a_broken_one_never(
    tmp_path: Path,
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair = old.issue("server")
    security = SecuritySettings(tls_cert_file=str(pair.cert), tls_key_file=str(pair.key))

    async def status(authority: Authority) -> int:
        trusted = ssl.create_default_context(cafile=str(authority.file))
        async with aiohttp.ClientSession() as session, session.get(system.console, ssl=trusted) as answer:
            return answer.status

    async with deployed(tmp_path, security=security, prefill=0, decode=0) as system:
        assert await status(old) == 200
        new.issue("server")
        assert await status(new) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await status(old)
        pair.cert.write_text("no certificate")
        assert await status(new) == 200


def test_a_worker_that_ends_unasked_is_lost_until_its_successor_is_there() -> None:
    world, watch = World(), ConsoleWatch()
    for name in ("decode-0", "decode-1"):
        world.join(name, Role.DECODE)
    world.drain("decode-1")
    fleet = world.registry.fleet

    def lost() -> list[str]:
        watch.ticked(fleet, world.now)
        return [one.id for one in watch.lost()]

    assert lost() == []
    world.end_process("decode-0")
    world.end_process("decode-1")
    assert lost() == ["decode-0"]
    world.join("decode-0", Role.DECODE, epoch=2)
    assert lost() == []
    world.end_process("decode-0")
    world.now += 1.0
    assert lost() == ["decode-0"]
    world.now += WINDOW_S
    assert lost() == []


def test_what_is_older_than_the_window_counts_no_more() -> None:
    watch = ConsoleWatch()
    report = Report(
        id=RequestId("r"),
        model="m",
        tenant="",
        priority=0,
        prompt_tokens=3,
        output_tokens=4,
        attempts=1,
        e2e_s=1.0,
        queue_s=0.1,
        sla_class="batch",
    )
    watch.ended(report, FinishReason.STOP, 0.0)
    watch.ended(report, Overloaded("full"), WINDOW_S)
    watch.ticked(Fleet(), WINDOW_S + 1.0)
    (tally,) = watch.tallies().values()
    assert (tally.requests, tally.failed) == (1, 1)
