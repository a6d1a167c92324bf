"""vLLM on the CPU: one instance on all cores, and prefill + decode instances joined by NIXL."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from benchmarks.openai_http import CompletionsClient, HttpError, Json
from benchmarks.peers import VLLM
from benchmarks.processes import Command
from benchmarks.system import Answer, System, free_port
from benchmarks.workload import Prompt

BODY: dict[str, Json] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


class Vllm(System):
    """`vllm serve`, compiled, bound to every core."""

    name: ClassVar[str] = "vllm"
    describes: ClassVar[str] = "vLLM CPU, one instance on all cores, torch.compile, bf16"
    estimated_gib: ClassVar[float] = 3.5

    async def start(self) -> None:
        port = free_port()
        self.commands = [self._command(port, self.setup.cores)]
        self.processes.spawn(self.commands[0])
        self._client = CompletionsClient(f"http://127.0.0.1:{port}")
        self.connections.push_async_callback(self._client.close)
        await self.wait_ready(self._client.is_healthy)

    async def answer(self, prompt: Prompt, output_tokens: int) -> Answer:
        return await self._client.stream(
            {
                **BODY,
                "model": "model",
                "prompt": list(prompt.token_ids),
                "max_tokens": output_tokens,
                "stream_options": {"include_usage": True},
            }
        )

    def versions(self) -> dict[str, str]:
        return VLLM.versions(self.setup.venv_root)

    def _command(self, port: int, cores: Sequence[int], role: str | None = None) -> Command:
        setup = self.setup
        return serve_command(
            setup.model_dir,
            port=port,
            cores=cores,
            role=role,
            venv_root=setup.venv_root,
            kv_gib=setup.kv_gib,
            log=self.log("" if role is None else f"-{role}"),
        )


class VllmDisaggregated(Vllm):
    """A producer on the first half of the cores, a consumer on the second, KV moved by NixlConnector.

    The benchmark sends each request to the producer and then to the consumer itself. In production a proxy
    does that; without one vLLM saves a process and a hop.
    """

    name: ClassVar[str] = "vllm-disaggregated"
    describes: ClassVar[str] = (
        "vLLM CPU, prefill + decode instances on half the cores each, KV over NIXL, eager, bf16, "
        "NIXL's progress thread slowed to 500 us, no proxy process"
    )
    estimated_gib: ClassVar[float] = 6.5

    async def start(self) -> None:
        cores = self.setup.cores
        half = max(1, len(cores) // 2)
        ports = (free_port(), free_port())
        self.commands = [
            self._command(ports[0], cores[:half], "kv_producer"),
            self._command(ports[1], cores[-half:], "kv_consumer"),
        ]
        for command in self.commands:
            self.processes.spawn(command)
        self._producer, self._consumer = (CompletionsClient(f"http://127.0.0.1:{port}") for port in ports)
        self.connections.push_async_callback(self._producer.close)
        self.connections.push_async_callback(self._consumer.close)
        await self.wait_ready(self._both_healthy)

    async def answer(self, prompt: Prompt, output_tokens: int) -> Answer:
        sent_s = time.perf_counter()
        body: dict[str, Json] = {**BODY, "model": "model", "prompt": list(prompt.token_ids)}
        remote: dict[str, Json] = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
        read = await self._producer.complete({**body, "max_tokens": 1, "kv_transfer_params": remote})
        handed_over = read.get("kv_transfer_params")
        if not isinstance(handed_over, dict):
            raise HttpError("the producer returned no kv_transfer_params: nothing would be transferred")
        usage: dict[str, Json] = {"include_usage": True}
        body |= {"max_tokens": output_tokens, "kv_transfer_params": handed_over, "stream_options": usage}
        return await self._consumer.stream(body, sent_s=sent_s)

    async def _both_healthy(self) -> bool:
        return await self._producer.is_healthy() and await self._consumer.is_healthy()


def serve_command(
    model_dir: Path,
    *,
    port: int,
    cores: Sequence[int],
    role: str | None = None,
    venv_root: Path,
    kv_gib: int,
    log: Path,
) -> Command:
    """One vLLM instance bound to `cores`; with a role, one side of a NIXL pair."""
    argv = [str(VLLM.path(venv_root) / "bin" / "vllm"), "serve", str(model_dir)]
    argv += ["--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", "2048"]
    argv += ["--max-num-seqs", "32", "--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port)]
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        # By default it leaves one core idle, which halves the speed of a small machine.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }
    if role is not None:
        transfer = {
            "kv_connector": "NixlConnector",
            "kv_role": role,
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"backends": ["UCX"]},
        }
        argv += ["--enforce-eager", "--kv-transfer-config", json.dumps(transfer)]
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
        env["UCX_NET_DEVICES"] = "lo"
    return Command(argv=tuple(argv), env=env, log=log)
