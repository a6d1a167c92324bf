"""Requests through gRPC, coordinator and channels to scripted workers, and back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pdserve.core.errors import DeadlineExceeded, Overloaded, PdServeError, WorkerLost
from pdserve.core.messages import Cancel, FinishReason, PushesSettled, Role, StartDecode, StartPrefill
from tests.support.deployment import Deployed, deployed, scenario
from tests.support.model_workers import ModelDecode, continuation

PROMPT = "hello"
TOKENS = [ord(c) for c in PROMPT]


def text_after(prompt: list[int], count: int) -> str:
    return "".join(map(chr, continuation(prompt, count)))


async def assert_idle(system: Deployed) -> None:
    """Every worker has its blocks back, and the coordinator remembers nobody."""
    for worker in system.cluster.workers.values():
        await worker.until_idle()
    assert system.coordinator.snapshot().active == 0
    for worker in system.cluster.workers.values():
        if isinstance(worker.model, ModelDecode):
            assert len(worker.model.free) == worker.info.num_blocks


@scenario
async def test_an_answer_is_streamed_with_usage_and_timings(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        deltas = [delta async for delta in system.client.stream(PROMPT, max_tokens=10)]
        assert "".join(delta.text for delta in deltas) == text_after(TOKENS, 10)
        assert [t for delta in deltas for t in delta.token_ids] == continuation(TOKENS, 10)
        last = deltas[-1]
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert last.finish_reason is FinishReason.LENGTH
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 10)
        assert last.timings is not None
        assert (last.timings.prefill_worker, last.timings.decode_worker) == ("prefill-0", "decode-0")
        assert (last.timings.transfer_path, last.timings.bytes_moved) == ("fake", 4096)
        assert last.timings.transfer_gb_per_s == pytest.approx(4096 / 0.25 / 1e9)
        assert 0 < last.timings.ttft_s <= last.timings.e2e_s
        await assert_idle(system)


@scenario
async def test_a_unary_answer_is_the_streamed_one_in_one_piece(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        completion = await system.client.generate(prompt_token_ids=TOKENS, max_tokens=6, logprobs=1)
        assert completion.model == "scripted"
        assert completion.text == text_after(TOKENS, 6)
        assert completion.token_ids == tuple(continuation(TOKENS, 6))
        assert [entry.token for entry in completion.logprobs] == list(completion.token_ids)
        assert [len(entry.top) for entry in completion.logprobs] == [1] * 6
        assert completion.timings.attempts == 1


@scenario
async def test_without_prefill_workers_the_answer_is_the_same(tmp_path: Path) -> None:
    async with deployed(tmp_path, prefill=0) as system:
        completion = await system.client.generate(PROMPT, max_tokens=6)
        assert completion.text == text_after(TOKENS, 6)
        assert completion.timings.prefill_worker == ""
        assert system.cluster.heard(StartPrefill) == []


@scenario
async def test_chat_messages_go_through_the_models_template(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        completion = await system.client.generate(messages=[{"role": "user", "content": "hi"}], max_tokens=4)
        prompt = [ord(c) for c in "[user]hi[assistant]"]
        assert completion.text == text_after(prompt, 4)
        assert completion.usage.prompt_tokens == len(prompt)


@scenario
async def test_samples_have_seeds_of_their_own_and_interleave(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        deltas = [d async for d in system.client.stream(PROMPT, max_tokens=5, n=3, seed=11, request_id="abc")]
        assert {d.request_id for d in deltas} == {"abc"}
        for index in range(3):
            mine = [d for d in deltas if d.index == index]
            assert "".join(d.text for d in mine) == text_after(TOKENS, 5)
            assert sum(d.finish_reason is not None for d in mine) == 1
        assert [d.usage is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == 15
        seeds = {m.spec.attempt.request: m.spec.sampling.seed for m in system.cluster.heard(StartDecode)}
        assert seeds["abc.0"] == 11
        assert len(set(seeds.values())) == 3


@scenario
async def test_a_stop_string_ends_the_answer_before_it_and_stops_the_worker(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        text = text_after(TOKENS, 60)
        stop = text[20:23]
        completion = await system.client.generate(PROMPT, max_tokens=400, stop=[stop, "not there"])
        assert completion.text == text[: text.index(stop)]
        assert completion.finish_reason is FinishReason.STOP
        assert completion.choices[0].matched_stop == stop
        assert len(completion.token_ids) == text.index(stop) + len(stop)
        assert completion.usage.completion_tokens == len(completion.token_ids)
        await system.worker("decode-0").until(Cancel)
        await assert_idle(system)


@scenario
async def test_a_stop_token_counts_but_is_not_shown(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        tokens = continuation(TOKENS, 40)
        stop = tokens[12]
        end = tokens.index(stop) + 1
        completion = await system.client.generate(PROMPT, max_tokens=40, stop_token_ids=[stop])
        assert completion.finish_reason is FinishReason.STOP
        assert list(completion.token_ids) == tokens[:end]
        assert completion.text == "".join(map(chr, tokens[: end - 1]))


@scenario
async def test_prompt_logprobs_come_with_the_first_sample(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        completion = await system.client.generate(PROMPT, max_tokens=2, prompt_logprobs=0, n=2)
        assert completion.prompt_logprobs[0] is None
        assert [e.token for e in completion.prompt_logprobs if e is not None] == TOKENS[1:]


@scenario
async def test_leaving_a_stream_frees_its_blocks_on_both_workers(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        decode = system.worker("decode-0")
        decode.allow(3)
        async with contextlib.aclosing(system.client.stream(PROMPT, max_tokens=400)) as stream:
            async for _ in stream:
                break
        await decode.until(Cancel)
        await assert_idle(system)


@scenario
async def test_a_cancelled_call_during_prefill_is_settled_at_decode(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        prefill, decode = system.worker("prefill-0"), system.worker("decode-0")
        prefill.allow(1)
        call = asyncio.create_task(system.client.generate(PROMPT, max_tokens=400))
        await prefill.until(StartPrefill)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await prefill.until(Cancel)
        await decode.until(PushesSettled)
        await assert_idle(system)


@scenario
async def test_a_deadline_ends_the_stream_and_frees_the_worker(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        system.worker("decode-0").allow(2)
        with pytest.raises(DeadlineExceeded, match="not finished within"):
            await system.client.generate(PROMPT, max_tokens=400, deadline_s=0.3)
        await assert_idle(system)


@scenario
async def test_a_decode_worker_that_dies_costs_a_pause_and_no_token(tmp_path: Path) -> None:
    async with deployed(tmp_path, decode=1) as system:
        first = system.worker("decode-0")
        first.allow(5)
        text, killed = "", False
        async for delta in system.client.stream(PROMPT, max_tokens=20):
            text += delta.text
            if len(text) == 6 and not killed:
                killed = True
                await first.kill()
                await system.coordinator.remove_worker(first.info.worker, "killed")
                await system.add("decode-0", Role.DECODE, epoch=2)
            last = delta
        assert killed
        assert text == text_after(TOKENS, 20)
        assert last.timings is not None
        assert last.timings.attempts == 2
        await assert_idle(system)


@scenario
async def test_a_prefill_worker_that_dies_is_replaced_by_another(tmp_path: Path) -> None:
    async with deployed(tmp_path, prefill=2) as system:
        for name in ("prefill-0", "prefill-1"):
            system.worker(name).allow(1)
        call = asyncio.create_task(system.client.generate(PROMPT, max_tokens=8))
        victim = await system.cluster.who_hears(StartPrefill)
        for worker in system.cluster.workers.values():
            worker.allow(None)
        victim.mute()
        await victim.kill()
        await system.coordinator.remove_worker(victim.info.worker, "killed")
        completion = await call
        assert completion.text == text_after(TOKENS, 8)
        await assert_idle(system)


@scenario
async def test_a_worker_that_falls_silent_is_left_even_though_its_connection_stands(tmp_path: Path) -> None:
    async with deployed(tmp_path, decode=2, heartbeat_timeout_s=0.3) as system:
        for name in ("decode-0", "decode-1"):
            system.worker(name).allow(2)
        call = asyncio.create_task(system.client.generate(PROMPT, max_tokens=30))
        victim = await system.cluster.who_hears(StartDecode)
        victim.mute()
        for worker in system.cluster.workers.values():
            worker.allow(None)
        completion = await call
        assert completion.text == text_after(TOKENS, 30)
        assert completion.timings.attempts == 2
        assert [w.up for w in system.coordinator.snapshot().workers if w.id == victim.info.worker] == [False]


@scenario
async def test_when_every_attempt_fails_the_stream_ends_with_a_typed_error(tmp_path: Path) -> None:
    async with deployed(tmp_path, max_attempts=1) as system:
        decode = system.worker("decode-0")
        decode.allow(2)
        call = asyncio.create_task(system.client.generate(PROMPT, max_tokens=50))
        await decode.until(StartDecode)
        await decode.kill()
        with pytest.raises(WorkerLost, match="decode-0 was lost"):
            await call


@scenario
async def test_requests_beyond_the_queue_are_refused_with_a_hint(tmp_path: Path) -> None:
    async with deployed(tmp_path, decode=0, prefill=0, max_queued_requests=1) as system:
        calls = [asyncio.create_task(system.client.generate(PROMPT, max_tokens=2)) for _ in range(2)]
        (refused,), (waiting,) = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        error = refused.exception()
        assert isinstance(error, Overloaded)
        assert error.retry_after_s is not None
        await system.add("decode-0", Role.DECODE)
        assert (await waiting).text == text_after(TOKENS, 2)


@scenario
async def test_health_follows_the_workers(tmp_path: Path) -> None:
    async with deployed(tmp_path, decode=0) as system, grpc.aio.insecure_channel(system.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        names = ("", "scripted", "pdserve.v1.Generation")
        assert {await status(name) for name in names} == {health_pb2.HealthCheckResponse.NOT_SERVING}
        worker = await system.add("decode-0", Role.DECODE)
        assert {await status(name) for name in names} == {health_pb2.HealthCheckResponse.SERVING}
        models = await system.client.list_models()
        assert [(m.name, m.max_model_len, m.decode_workers, m.ready) for m in models] == [
            ("scripted", 512, 1, True)
        ]
        await worker.kill()
        await system.coordinator.remove_worker(worker.info.worker, "test")
        assert {await status(name) for name in names} == {health_pb2.HealthCheckResponse.NOT_SERVING}


@scenario
async def test_reflection_describes_the_service(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:

        def services() -> list[str]:
            with grpc.insecure_channel(system.address) as channel:
                return list(ProtoReflectionDescriptorDatabase(channel).get_services())

        assert "pdserve.v1.Generation" in await asyncio.to_thread(services)


@scenario
async def test_a_finished_request_leaves_metrics_and_a_log_line(tmp_path: Path) -> None:
    lines: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record)

    logger, handler = logging.getLogger("pdserve.request"), Keep()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        async with deployed(tmp_path) as system:
            await system.client.generate(
                PROMPT, max_tokens=8, tenant="acme", priority=2, ttft_target_ms=1e6, tpot_target_ms=1e-6
            )
            url = f"http://127.0.0.1:{system.metrics_port}/metrics"
            page = (await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())).decode()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [line.getMessage() for line in lines] == ["accepted", "placed", "ended"]
    assert len({line.__dict__["fields"]["request"] for line in lines}) == 1
    entry = lines[-1].__dict__["fields"]
    assert (entry["tenant"], entry["priority"], entry["outcome"]) == ("acme", 2, "length")
    assert (entry["ttft_met"], entry["tpot_met"]) == (True, False)
    assert entry["output_tokens"] == 8
    labels = 'model="scripted",outcome="length",priority="2",tenant="acme"'
    assert f"pdserve_requests_total{{{labels}}} 1.0" in page
    assert (
        'pdserve_targets_total{model="scripted",result="missed",sla_class="",target="tpot",tenant="acme"} 1.0'
        in page
    )
    assert 'pdserve_transfer_bytes_total{model="scripted",path="fake"} 4096.0' in page
    assert 'pdserve_ttft_seconds_count{model="scripted"} 1.0' in page
    assert 'pdserve_itl_seconds_count{model="scripted"} 7.0' in page


@scenario
async def test_stopping_lets_running_requests_finish_within_the_grace(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        decode = system.worker("decode-0")
        decode.allow(2)
        call = asyncio.create_task(system.client.generate(PROMPT, max_tokens=9))
        await decode.until(StartDecode)
        stop = asyncio.create_task(system.coordinator.stop(10.0))
        decode.allow(None)
        assert (await call).text == text_after(TOKENS, 9)
        await stop


@scenario
async def test_stopping_without_grace_ends_running_requests_with_an_error(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        decode = system.worker("decode-0")
        decode.allow(2)
        call = asyncio.create_task(system.client.generate(PROMPT, max_tokens=9))
        await decode.until(StartDecode)
        await system.coordinator.stop(0.0)
        with pytest.raises(PdServeError):
            await call


@scenario
async def test_an_identifier_can_be_used_again_once_its_request_has_ended(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        for _ in range(2):
            completion = await system.client.generate(PROMPT, max_tokens=3, request_id="mine")
            assert completion.request_id == "mine"
        epochs = [m.spec.attempt.epoch for m in system.cluster.heard(StartDecode)]
        assert epochs[1] > epochs[0]
