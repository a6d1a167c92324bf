"""Who gets through with which key, and what nobody gets to see."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from coordinator.keys import ApiKeys, Scope, new_key
from pdserve.cli.app import app
from pdserve.client import Access, AsyncClient
from pdserve.client.admin import explain, scale, undrain
from pdserve.core.errors import (
    ConfigError,
    InvalidRequest,
    PermissionDenied,
    RequestNotFound,
    Unauthenticated,
)
from pdserve.core.security_settings import SecuritySettings
from tests.support.deployment import deployed, scenario

KEYS = {name: new_key() for name in ("anyone", "search", "watcher", "boss")}
ENTRIES = [
    {"name": "anyone", "sha256": KEYS["anyone"][1]},
    {"name": "search", "sha256": KEYS["search"][1], "tenant": "search"},
    {"name": "watcher", "sha256": KEYS["watcher"][1], "scopes": ["observe"]},
    {"name": "boss", "sha256": KEYS["boss"][1], "scopes": ["admin"]},
]
TEXT = yaml.safe_dump({"keys": ENTRIES})


def access(name: str) -> Access:
    return Access(api_key=KEYS[name][0])


@scenario
async def test_a_known_key_gets_an_answer_and_others_are_told_what_is_missing(tmp_path: Path) -> None:
    async with deployed(tmp_path, keys=TEXT, access=access("anyone")) as system:
        assert (await system.client.generate("hello", max_tokens=2)).usage.completion_tokens == 2
        assert [model.name for model in await system.client.list_models()] == ["scripted"]
        async with AsyncClient(system.address) as nobody:
            with pytest.raises(Unauthenticated, match="authorization: Bearer"):
                await nobody.generate("hello")
        async with AsyncClient(system.address, access=Access(api_key="pds_guessed")) as stranger:
            with pytest.raises(Unauthenticated, match="not known"):
                _ = [delta async for delta in stranger.stream("hello")]


@scenario
async def test_probes_need_no_key(tmp_path: Path) -> None:
    async with deployed(tmp_path, keys=TEXT) as system, grpc.aio.insecure_channel(system.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@scenario
async def test_a_key_does_what_its_scopes_say_and_no_more(tmp_path: Path) -> None:
    async with deployed(tmp_path, keys=TEXT, access=access("watcher")) as system:
        with pytest.raises(PermissionDenied, match="watcher has no scope generate"):
            await system.client.generate("hello")
        with pytest.raises(RequestNotFound):
            await asyncio.to_thread(explain, system.address, access=access("watcher"))
        for name in ("watcher", "anyone"):
            with pytest.raises(PermissionDenied, match="has no scope admin"):
                await asyncio.to_thread(undrain, system.address, "decode-0", access=access(name))
            with pytest.raises(PermissionDenied, match="has no scope admin"):
                await asyncio.to_thread(
                    lambda key: list(scale(system.address, decode=2, access=key)), access(name)
                )
        with pytest.raises(InvalidRequest, match="no-such"):
            await asyncio.to_thread(undrain, system.address, "no-such", access=access("boss"))


@scenario
async def test_commands_send_the_key_that_is_given_before_them(tmp_path: Path) -> None:
    async with deployed(tmp_path, keys=TEXT) as system:

        def undrain_as(*options: str) -> BaseException | None:
            command = [*options, "undrain", "no-such", "--address", system.address]
            return CliRunner().invoke(app, command, env={"PDSERVE_API_KEY": None}).exception

        assert isinstance(await asyncio.to_thread(undrain_as), Unauthenticated)
        allowed = await asyncio.to_thread(undrain_as, "--api-key", KEYS["boss"][0])
        assert isinstance(allowed, InvalidRequest)


@scenario
async def test_a_tenants_key_makes_requests_the_tenants_and_nobody_elses(tmp_path: Path) -> None:
    limits = {"search": {"max_concurrent": 1, "max_requests_per_s": 0.001, "burst_s": 1000}}
    async with deployed(tmp_path, keys=TEXT, access=access("search"), tenants=limits) as system:
        with pytest.raises(PermissionDenied, match="search's, not chat's"):
            await system.client.generate("hello", tenant="chat")
        await system.client.generate("hello", max_tokens=2)
        with pytest.raises(Exception, match="search"):  # its quota of one request is used up
            await system.client.generate("hello", max_tokens=2, tenant="search")
        async with AsyncClient(system.address, access=access("anyone")) as other:
            await other.generate("hello", max_tokens=2)


@scenario
async def test_keys_follow_their_file_and_stay_as_they_were_while_it_is_broken(tmp_path: Path) -> None:
    now = 0.0
    file = tmp_path / "keys.yaml"
    file.write_text(TEXT)
    keys = ApiKeys.from_file(file, clock=lambda: now)
    file.write_text(yaml.safe_dump({"keys": ENTRIES[1:]}))
    assert keys.caller(KEYS["anyone"][0]).name == "anyone"
    now = 2.0
    with pytest.raises(Unauthenticated):
        keys.caller(KEYS["anyone"][0])
    file.write_text("keys: [")
    now = 4.0
    assert keys.caller(KEYS["search"][0]).tenant == "search"


def test_a_wrong_file_is_refused_without_showing_what_is_in_it(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    for content in (
        "keys: [{name: a, sha256: hunter2}]",
        "keys: hunter2",
        "hunter2: [",
        "keys: []",
        f"keys: [{{name: a, sha256: {'0' * 64}, scopes: [hunter2]}}]",
        f"keys: [{{name: a, sha256: {'0' * 64}}}, {{name: a, sha256: {'1' * 64}}}]",
    ):
        file.write_text(content)
        with pytest.raises(ConfigError) as refused:
            ApiKeys.from_file(file)
        assert "hunter2" not in str(refused.value)
        assert refused.value.__cause__ is None
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="No such file"):
        ApiKeys.from_file(tmp_path / "none")


@scenario
async def test_keys_in_both_places_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(TEXT)
    with pytest.raises(ConfigError, match="remove one"):
        async with deployed(tmp_path, keys=TEXT, security=SecuritySettings(api_keys_file=str(file))):
            pass


def test_a_key_is_shown_by_nothing_that_prints_who_may_enter() -> None:
    assert KEYS["boss"][0] not in repr(access("boss"))


@scenario
async def test_no_log_line_holds_a_key(tmp_path: Path) -> None:
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage() + repr(record.__dict__))

    handler = Collect()
    logging.getLogger().addHandler(handler)
    try:
        async with deployed(tmp_path, keys=TEXT, access=access("anyone")) as system:
            await system.client.generate("hello", max_tokens=2)
            async with AsyncClient(system.address, access=Access(api_key="pds_guessed")) as stranger:
                with pytest.raises(Unauthenticated):
                    await stranger.generate("hello")
    finally:
        logging.getLogger().removeHandler(handler)
    assert not any(KEYS["anyone"][0] in line or "pds_guessed" in line for line in lines)


def test_admin_includes_the_other_scopes() -> None:
    boss = ApiKeys.from_text(TEXT, "test").caller(KEYS["boss"][0])
    for scope in Scope:
        boss.require(scope)
