"""Afterwards it can be said why a request went where it went, and how its time went."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.stories import Stories, Story
from pdserve.cli import explain as explain_command
from pdserve.cli.timeline import chrome_trace
from pdserve.client.admin import explain
from pdserve.core.errors import Overloaded, RequestNotFound
from pdserve.core.messages import Role
from pdserve.core.proto.pdserve.v1 import admin_pb2 as pb
from tests.support.deployment import Deployed, deployed, scenario
from tests.support.registry_world import SETTINGS, World, new_request


async def ask(system: Deployed, request: str = "") -> pb.Explanation:
    return await asyncio.to_thread(explain, system.address, request)


async def told(system: Deployed, **options: Any) -> pb.Explanation:
    await system.client.generate("hello", max_tokens=6, request_id="one", **options)
    return await ask(system, "one")


@scenario
async def test_a_story_has_candidates_predictions_attempts_and_the_outcome(tmp_path: Path) -> None:
    async with deployed(tmp_path, prefill=2, decode=2, policy="sla") as system:
        story = await told(system, ttft_target_ms=60_000, sla_class="interactive", tenant="acme")
        assert (story.request, story.tenant, story.sla_class) == ("one", "acme", "interactive")
        assert (story.prompt_tokens, story.output_tokens, story.outcome) == (5, 6, "length")
        (decision,) = story.decisions
        assert decision.attempt == 0
        assert {c.worker for c in decision.decode.candidates} == {"decode-0", "decode-1"}
        assert all(c.tpot_s > 0 for c in decision.decode.candidates)
        readers = decision.prefill.candidates or decision.decode.candidates
        assert readers
        assert all(c.ttft_s > 0 for c in decision.prefill.candidates)
        assert decision.routes[0].decode == decision.decode.worker
        (attempt,) = story.attempts
        assert attempt.decode_worker == decision.decode.worker
        assert attempt.chunks[-1].tokens_done == 5
        assert 0 <= attempt.start_s <= attempt.chunks[-1].at_s <= attempt.end_s
        assert sum(output.tokens for output in story.outputs) == 6
        assert story.phases[0].phase == "queued"
        assert [p.start_s for p in story.phases] == sorted(p.start_s for p in story.phases)
        assert story.timings.ttft_late_s < 0
        assert any("admitted" in note.text for note in story.notes)
        assert (await ask(system)).request == "one"  # the last one


@scenario
async def test_a_running_request_has_a_story_too(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        system.worker("decode-0").allow(3)
        stream = system.client.stream("hello", max_tokens=200, request_id="slow")
        await anext(stream)
        story = await ask(system, "slow")
        assert (story.outcome, story.attempts[0].decode_worker) == ("", "decode-0")
        assert story.output_tokens >= 1
        await stream.aclose()


@scenario
async def test_a_refused_request_says_why(tmp_path: Path) -> None:
    tenants = {"a": {"max_requests_per_s": 1e-3, "burst_s": 1000.0}}
    async with deployed(tmp_path, tenants=tenants) as system:
        await told(system, tenant="a")
        with pytest.raises(Overloaded, match=r"more than 0\.001 requests per second"):
            await system.client.generate("hello", request_id="two", tenant="a")
        story = await ask(system, "two")
        assert (story.outcome, story.decisions[:], story.attempts[:]) == ("Overloaded", [], [])
        assert "more than 0.001 requests per second" in story.error


@scenario
async def test_only_the_last_requests_are_remembered_and_the_answer_says_how_many(tmp_path: Path) -> None:
    async with deployed(tmp_path, explain_last=2) as system:
        with pytest.raises(RequestNotFound, match="no request yet"):
            await ask(system)
        for name in ("a", "b", "c"):
            await system.client.generate("hello", max_tokens=2, request_id=name)
        with pytest.raises(RequestNotFound, match="'a'; the last 2 are remembered"):
            await ask(system, "a")
        assert (await ask(system, "b")).outcome == "length"


def test_memory_is_bounded_by_requests_notes_and_outputs() -> None:
    stories = Stories(3)
    for index in range(10):
        request = new_request(f"r{index}")
        story = stories.begin(Story(request=request, prompt_tokens=1, history=[]))
    assert len(stories) == 3
    assert story is not None
    for index in range(5000):
        story.note(float(index), str(index))
        story.output(float(index), 1)
    assert (len(story.notes), story.notes[0].text, story.notes[-1].text) == (64, "0", "4999")
    assert len(story.output_at) + story.outputs_left_out == 5000
    assert Stories(0).begin(story) is None


def test_an_interruption_is_told_on_both_sides() -> None:
    world = World(replace(SETTINGS, explain_last=8))
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE, max_num_seqs=1)
    world.submit(new_request("batch", max_tokens=40, priority=9, preemptible=True))
    for _ in range(8):
        while world.pushes:
            world.land(0)
        for worker in list(world.workers):
            world.step(worker)
        world.flush()
    urgent = new_request("urgent", ttft_target_s=0.5)
    world.submit(urgent)
    world.run()
    notes = {
        name: " | ".join(note.text for note in found[0].notes)
        for name in ("batch", "urgent")
        if (found := world.registry.story(new_request(name).id)) is not None
    }
    assert "asked to give way to urgent | it gave way to a more urgent request" in notes["batch"]
    assert "waits for batch to give way" in notes["urgent"]


# --- what users see -----------------------------------------------------------------------------------


@scenario
async def test_the_timeline_is_a_trace_that_perfetto_reads(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        trace = json.loads(chrome_trace(await told(system)))
    assert trace["displayTimeUnit"] == "ms"
    names: dict[int, str] = {}
    spans: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X", "i")
        if event["ph"] == "M":
            if event["name"] == "process_name":
                names[event["pid"]] = event["args"]["name"]
            continue
        assert event["pid"] in names  # named before it is used
        assert event["ts"] >= 0
        assert isinstance(event["name"], str)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            spans[(event["pid"], event["tid"])].append((event["ts"], event["ts"] + event["dur"]))
    assert set(names.values()) == {"coordinator", "prefill-0", "decode-0"}
    labels = {event["name"] for event in trace["traceEvents"]}
    assert {"queued", "prefilling", "decoding", "attempt 0", "chunk to 5", "KV to decode-0", "step"} <= labels
    for thread in spans.values():
        ordered = sorted(thread)
        assert all(end <= start + 1e-3 for (_, end), (start, _) in itertools.pairwise(ordered))


@scenario
async def test_the_command_prints_words_json_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with deployed(tmp_path, prefill=1, decode=2, policy="sla") as system:
        await told(system, ttft_target_ms=60_000)
        file = tmp_path / "trace.json"
        for options in ({}, {"as_json": True}, {"trace": file}):
            await asyncio.to_thread(
                explain_command.explain, **{"request": "one", "address": system.address, **options}
            )
        out = capsys.readouterr().out
    words, _, rest = out.partition("{\n")
    assert "taken:" in words
    assert "decode-1" in words
    assert "target met by" in words
    assert json.loads("{\n" + rest)["decisions"][0]["policy"] == "sla"
    assert json.loads(file.read_text())["otherData"]["request"] == "one"
