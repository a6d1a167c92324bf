"""What the gateway costs: tokens per second and core, and what it adds to a first token.

    python -m benchmarks.gateway

The coordinator as it is served, in a process of its own; workers that speak the protocol and compute nothing
in a second one, clients in a third. Figures are per second of the coordinator's own CPU time, so that they
mean the same on a machine that is busy otherwise; the time to a first token is wall time, the workers' and
the clients' part included.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
import uvloop

from benchmarks.environment import describe_environment
from coordinator.models import ServedModel
from coordinator.service import Coordinator
from pdserve.core.channel import Channel, listen
from pdserve.core.config import CoordinatorSettings, ServeConfig
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout
from pdserve.core.messages import (
    Cancel,
    FinishReason,
    Heartbeat,
    Hello,
    Message,
    Reserved,
    Role,
    StartDecode,
    Tokens,
    WorkerInfo,
)
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.worker_state import BlockCounts
from pdserve.models import store

_WORKERS: Final = 2
_PROMPT: Final = list(range(10, 42))
_BLOCKS: Final = 1_000_000
_BEAT_S: Final = 0.5
_WARM_UP: Final = 50
_BLOCK: Final = 200
_WORDS: Final = range(1000, 30_000, 7)
"""Token ids of the answers: ordinary words."""


@dataclass(slots=True)
class _Run:
    attempt: AttemptId
    left: int
    written: int = 0


@dataclass(slots=True)
class EmptyWorker:
    """A decode worker that writes a token for every request each `step_s`, and computes nothing."""

    name: str
    step_s: float
    runs: dict[AttemptId, _Run] = field(default_factory=dict)
    server: asyncio.Server | None = None

    async def serve(self, folder: Path) -> str:
        self.server, address = await listen(f"unix:{folder}/{self.name}.sock", self._converse)
        return address

    async def _converse(self, channel: Channel) -> None:
        channel.send([Hello(protocol=PROTOCOL_VERSION, sender=self.name)])
        channel.send([self._info(), self._beat()])
        writing = asyncio.create_task(self._write(channel))
        while (batch := await channel.receive()) is not None:
            for message in batch:
                if isinstance(message, StartDecode):
                    self._start(channel, message)
                elif isinstance(message, Cancel):
                    self.runs.pop(message.attempt, None)
        writing.cancel()

    def _start(self, channel: Channel, message: StartDecode) -> None:
        attempt, count = message.spec.attempt, message.spec.sampling.max_tokens
        run = self.runs[attempt] = _Run(attempt, count)
        # The first token at once: what comes before it is what is measured.
        channel.send([Reserved(attempt=attempt, blocks=[BlockId(0)], cached_tokens=0), self._token(run)])

    def _token(self, run: _Run) -> Tokens:
        run.left -= 1
        run.written += 1
        done = run.left <= 0
        if done:
            del self.runs[run.attempt]
        return Tokens(
            attempt=run.attempt,
            first_index=run.written - 1,
            tokens=[_WORDS[run.written % len(_WORDS)]],
            finish_reason=FinishReason.LENGTH if done else None,
        )

    async def _write(self, channel: Channel) -> None:
        loop = asyncio.get_running_loop()
        due, beat = loop.time(), 0.0
        while True:
            due = max(due + self.step_s, loop.time() - self.step_s)
            await asyncio.sleep(max(due - loop.time(), 0.0))
            said: list[Message] = [self._token(run) for run in list(self.runs.values())]
            if loop.time() >= beat:
                beat = loop.time() + _BEAT_S
                said.append(self._beat())
            channel.send(said)
            await channel.drain()

    def _info(self) -> WorkerInfo:
        group = CacheGroup(name="full", num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
        layout = GroupLayout(group=group, block_tokens=64)
        return WorkerInfo(
            worker=WorkerId(self.name),
            role=Role.DECODE,
            epoch=1,
            pid=0,
            host="here",
            fingerprint=Fingerprint(protocol=PROTOCOL_VERSION, model="m", layouts=(layout,)),
            transfer_metadata=b"",
            num_blocks=_BLOCKS,
            block_tokens=64,
            max_model_len=8192,
            max_num_seqs=4096,
        )

    def _beat(self) -> Heartbeat:
        counts = BlockCounts(total=_BLOCKS, free=_BLOCKS, held=0, cached=0, quarantined=0)
        return Heartbeat(
            worker=WorkerId(self.name),
            epoch=1,
            blocks=counts,
            waiting=0,
            running=len(self.runs),
            waiting_tokens=0,
            step_s=self.step_s,
            tokens_per_s=1e6,
            prefix_hit_tokens=0,
            prefix_query_tokens=0,
            steps=1,
        )


# --- the three processes ------------------------------------------------------------------------------


async def workers_main(folder: Path, step_s: float) -> None:
    workers = [EmptyWorker(f"decode-{i}", step_s) for i in range(_WORKERS)]
    addresses = [await worker.serve(folder) for worker in workers]
    _say({"addresses": addresses})
    await asyncio.Event().wait()


async def coordinator_main(model_dir: Path, addresses: Sequence[str]) -> None:
    config = ServeConfig(coordinator=CoordinatorSettings(port=0, max_queued_requests=10_000))
    coordinator = Coordinator(config, [ServedModel.from_dir(model_dir, name="m")])
    endpoints = await coordinator.start()
    for address in addresses:
        await coordinator.add_worker(address)
    _say({"grpc": endpoints.grpc})
    await asyncio.Event().wait()


@dataclass(slots=True)
class _Tally:
    tokens: int = 0
    messages: int = 0


async def clients_main(address: str, streams: int, seconds: float) -> None:
    """`streams` answers without end; says what came in the middle of `seconds`, when asked by the clock."""
    tally = _Tally()
    async with grpc.aio.insecure_channel(
        address, options=[("grpc.max_concurrent_streams", 10_000)]
    ) as channel:
        method = _stream(channel)
        request = _request(8000)
        tasks = [asyncio.create_task(_count(method(request), tally)) for _ in range(streams)]
        await asyncio.sleep(seconds * 0.3)
        _say({"tokens": tally.tokens, "messages": tally.messages, "at": time.monotonic()})
        await asyncio.sleep(seconds * 0.7)
        _say({"tokens": tally.tokens, "messages": tally.messages, "at": time.monotonic()})
        failed = [error for task in tasks if task.done() and (error := task.exception()) is not None]
        if failed:
            raise failed[0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _count(call: Any, tally: _Tally) -> None:
    async for delta in call:
        tally.tokens += len(delta.token_ids)
        tally.messages += 1


async def echo_main() -> None:
    """A gRPC server of the same kind that answers at once: what gRPC itself takes."""

    async def answer(_: pb.GenerateRequest, context: Any) -> None:
        await context.write(pb.GenerateDelta(token_ids=[1], text="a"))

    method = grpc.unary_stream_rpc_method_handler(
        answer, pb.GenerateRequest.FromString, pb.GenerateDelta.SerializeToString
    )
    server = grpc.aio.server()
    service = "pdserve.v1.Generation"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"GenerateStream": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _say({"grpc": f"127.0.0.1:{port}"})
    await server.wait_for_termination()


async def first_tokens_main(address: str, echo: str, count: int) -> None:
    """Time to a first token of `count` requests, one after another, in turn with a bare gRPC server."""
    times: dict[str, list[float]] = {"gateway": [], "bare": []}
    async with grpc.aio.insecure_channel(address) as one, grpc.aio.insecure_channel(echo) as other:
        for index in range(count + _WARM_UP):
            for name, channel in (("gateway", one), ("bare", other)):
                begun = time.perf_counter()
                async for _ in _stream(channel)(_request(1)):
                    break
                if index >= _WARM_UP:
                    times[name].append((time.perf_counter() - begun) * 1e3)
    _say({name: [_best(took, q) for q in (0.5, 0.9, 0.99)] for name, took in times.items()})


def _best(times: list[float], q: float) -> float:
    """The quantile of the block of requests in which it was least: the quietest moment of a busy machine."""
    blocks = [times[at : at + _BLOCK] for at in range(0, len(times) - _BLOCK + 1, _BLOCK)]
    return min(_quantile(block, q) for block in blocks)


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(len(values) * q)]


def _stream(channel: grpc.aio.Channel) -> Any:
    return channel.unary_stream(
        "/pdserve.v1.Generation/GenerateStream",
        pb.GenerateRequest.SerializeToString,
        pb.GenerateDelta.FromString,
    )


def _request(max_tokens: int) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=max_tokens, ignore_eos=True, seed=1)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=_PROMPT), sampling=sampling, deadline_ms=600_000)


def _say(what: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


# --- the measurement ----------------------------------------------------------------------------------


class Part:
    """One of the processes."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gateway", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a part of the benchmark ended early")
        found: dict[str, Any] = json.loads(line)
        return found

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(
    model: Path, *, streams: int, step_ms: float, seconds: float, first_tokens: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        parts = [Part("workers", folder, str(step_ms / 1e3))]
        try:
            addresses = parts[0].hear()["addresses"]
            coordinator = Part("coordinator", str(model), *addresses)
            parts.append(coordinator)
            address = coordinator.hear()["grpc"]
            if first_tokens:
                parts.append(Part("echo"))
                echo, begun = parts[-1].hear()["grpc"], coordinator.cpu_s()
                parts.append(Part("first-tokens", address, echo, str(first_tokens)))
                found = parts[-1].hear()
                return {**found, "cpu_ms": (coordinator.cpu_s() - begun) / (first_tokens + _WARM_UP) * 1e3}
            parts.append(Part("clients", address, str(streams), str(seconds)))
            before, cpu_before = parts[-1].hear(), coordinator.cpu_s()
            after, cpu_after = parts[-1].hear(), coordinator.cpu_s()
            span, cpu = after["at"] - before["at"], cpu_after - cpu_before
            tokens, messages = (after[key] - before[key] for key in ("tokens", "messages"))
            return {
                "per_s": tokens / span,
                "per_cpu_s": tokens / cpu,
                "per_message": tokens / max(messages, 1),
                "busy": cpu / span,
            }
        finally:
            for part in reversed(parts):
                part.end()


def main() -> None:
    """Parts are started with their name as the first argument; without one, everything is measured."""
    parts: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
        "workers": lambda folder, step: workers_main(Path(folder), float(step)),
        "coordinator": lambda model, *addresses: coordinator_main(Path(model), addresses),
        "clients": lambda address, streams, seconds: clients_main(address, int(streams), float(seconds)),
        "echo": echo_main,
        "first-tokens": lambda address, echo, count: first_tokens_main(address, echo, int(count)),
    }
    if len(sys.argv) > 1 and sys.argv[1] in parts:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(parts[sys.argv[1]](*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=store.DEFAULT_MODEL, help="whose tokenizer writes the text")
    parser.add_argument("--streams", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--step-ms", type=float, nargs="*", default=[25.0, 5.0])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--first-tokens", type=int, default=2000)
    asked = parser.parse_args()
    model = store.resolve(asked.model, lambda fraction, text: None)
    about = describe_environment()
    print(f"{about.cpu}, {about.cores} cores, commit {about.commit}, load {about.load_before}")
    print(
        "| streams | a step | tokens/s asked | tokens/s | of a core | tokens per core second | per message |"
    )
    print("|---|---|---|---|---|---|---|")
    for step_ms, streams in itertools.product(asked.step_ms, asked.streams):
        got = measure(model, streams=streams, step_ms=step_ms, seconds=asked.seconds, first_tokens=0)
        print(
            f"| {streams} | {step_ms:g} ms | {streams / step_ms * 1e3:.0f} | {got['per_s']:.0f} "
            f"| {got['busy']:.0%} | {got['per_cpu_s']:.0f} | {got['per_message']:.2f} |",
            flush=True,
        )
    if asked.first_tokens:
        got = measure(model, streams=0, step_ms=1000.0, seconds=0, first_tokens=asked.first_tokens)
        print(f"\nbest of blocks of {_BLOCK} requests, in turn with a bare gRPC server")
        print("\n| first token | median | p90 | p99 |\n|---|---|---|---|")
        for name in ("gateway", "bare"):
            print(f"| {name} | " + " | ".join(f"{took:.2f} ms" for took in got[name]) + " |")
        print(f"{got['cpu_ms']:.2f} ms of the coordinator's CPU per request")


if __name__ == "__main__":
    main()
