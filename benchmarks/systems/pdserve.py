"""pdserve, started as a user starts it (`pdserve serve`) and asked through its gRPC client."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import ClassVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.environment import installed_versions
from benchmarks.processes import Command
from benchmarks.system import Answer, System, WrongAnswer, free_port
from benchmarks.workload import Prompt
from pdserve.client import AsyncClient


class PdserveDisaggregated(System):
    """One prefill worker and one decode worker, KV over NIXL."""

    name: ClassVar[str] = "pdserve"
    describes: ClassVar[str] = "pdserve, 1 prefill + 1 decode worker, KV over NIXL, bf16"
    can_freeze: ClassVar[bool] = False
    estimated_gib: ClassVar[float] = 5.0
    stop_grace_s: ClassVar[float] = 40.0

    prefill_workers: ClassVar[int] = 1

    async def start(self) -> None:
        port = free_port()
        self.commands = [self._command(port)]
        self.processes.spawn(self.commands[0])
        address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address) as channel:
            self._health = health_pb2_grpc.HealthStub(channel)
            await self.wait_ready(self._is_serving)
        self._client = AsyncClient(address)
        self.connections.push_async_callback(self._client.close)

    async def answer(self, prompt: Prompt, output_tokens: int) -> Answer:
        sent_s = time.perf_counter()
        first_s = last_s = 0.0
        usage = None
        stream = self._client.stream(
            prompt_token_ids=list(prompt.token_ids),
            max_tokens=output_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        async for delta in stream:
            if delta.token_ids:
                last_s = time.perf_counter()
                first_s = first_s or last_s
            usage = delta.usage or usage
        if usage is None or not first_s:
            raise WrongAnswer("the stream ended without tokens or without usage")
        return Answer(
            sent_s=sent_s,
            first_s=first_s,
            last_s=last_s,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
        )

    def versions(self) -> dict[str, str]:
        return installed_versions(
            Path(sys.prefix), ("pdserve", "torch", "ray", "nixl-cu13", "nixl-cu12", "grpcio")
        )

    def _command(self, port: int) -> Command:
        argv = [str(Path(sys.executable).parent / "pdserve"), "serve", "--model", str(self.setup.model_dir)]
        argv += ["--prefill", str(self.prefill_workers), "--decode", "1", "--port", str(port)]
        argv += ["--no-dashboard", "--set", f"cache.memory_gib={self.setup.kv_gib}"]
        return Command(argv=tuple(argv), env={}, log=self.log())

    async def _is_serving(self) -> bool:
        try:
            reply = await self._health.Check(health_pb2.HealthCheckRequest(service=""), timeout=5.0)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


class PdserveColocated(PdserveDisaggregated):
    """One worker that reads and writes: no transfer."""

    name: ClassVar[str] = "pdserve-colocated"
    describes: ClassVar[str] = "pdserve, 1 worker that reads prompts and decodes, all cores, bf16"
    estimated_gib: ClassVar[float] = 3.0
    prefill_workers: ClassVar[int] = 0
