"""Hugging Face transformers, twice: `generate` called directly, and `transformers serve`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from benchmarks.openai_http import CompletionsClient, Json
from benchmarks.peers import TRANSFORMERS
from benchmarks.processes import Command, ServerDied, python_of, tail
from benchmarks.system import Answer, System, free_port
from benchmarks.workload import Prompt

DRIVER = Path(__file__).resolve().parent.parent / "generate_driver.py"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class TransformersGenerate(System):
    """One process, no server: what a script that calls `generate` gets. 16 prompts are one static batch."""

    name: ClassVar[str] = "transformers-generate"
    describes: ClassVar[str] = (
        "transformers `generate`, eager, bf16, SDPA; the 16 streams are one static batch"
    )
    estimated_gib: ClassVar[float] = 1.0

    async def start(self) -> None:
        venv = TRANSFORMERS.path(self.setup.venv_root)
        self.commands = [
            Command(
                argv=(python_of(venv), "-P", str(DRIVER), str(self.setup.model_dir)),
                env={**OFFLINE, "OMP_NUM_THREADS": str(len(self.setup.cores))},
                log=self.log(),
            )
        ]
        self._process = self.processes.spawn(self.commands[0], stdin=subprocess.PIPE)
        self._lock = asyncio.Lock()
        async with asyncio.timeout(self.setup.start_timeout_s):
            while (await self._event())["event"] != "ready":
                pass

    async def answer(self, prompt: Prompt, output_tokens: int) -> Answer:
        return (await self._ask([prompt], output_tokens))[0]

    async def answer_all(self, prompts: Sequence[Prompt], output_tokens: int) -> list[Answer]:
        return await self._ask(prompts, output_tokens)

    def versions(self) -> dict[str, str]:
        return TRANSFORMERS.versions(self.setup.venv_root)

    async def _ask(self, prompts: Sequence[Prompt], output_tokens: int) -> list[Answer]:
        request = {"prompts": [prompt.token_ids for prompt in prompts], "output_tokens": output_tokens}
        async with self._lock:
            sent_s = time.perf_counter()
            if self._process.stdin is None:
                raise ServerDied("the driver's input is closed")
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            first_s = last_s = 0.0
            while (event := await self._event())["event"] == "token":
                last_s = time.perf_counter()
                first_s = first_s or last_s
        last_s = last_s or time.perf_counter()
        one = Answer(
            sent_s=sent_s,
            first_s=first_s or last_s,
            last_s=last_s,
            prompt_tokens=int(str(event["prompt_tokens"])),
            output_tokens=int(str(event["output_tokens"])),
        )
        return [one] * len(prompts)

    async def _event(self) -> dict[str, object]:
        if self._process.stdout is None:
            raise ServerDied("the driver's output is closed")
        line = await asyncio.to_thread(self._process.stdout.readline)
        if not line:
            raise ServerDied(f"generate_driver.py ended:\n{tail(self.commands[0].log)}")
        event: dict[str, object] = json.loads(line)
        return event


class TransformersServe(System):
    """`transformers serve --continuous-batching`. It takes text; its usage says how many tokens it read."""

    name: ClassVar[str] = "transformers-serve"
    describes: ClassVar[str] = "`transformers serve --continuous-batching`, bf16"
    estimated_gib: ClassVar[float] = 3.0

    PAGE_TOKENS: ClassVar[int] = 256

    async def start(self) -> None:
        port = free_port()
        model = str(self.setup.model_dir)
        num_pages = self.setup.kv_gib * 2**30 // (self.setup.kv_bytes_per_token * self.PAGE_TOKENS)
        argv = [str(TRANSFORMERS.path(self.setup.venv_root) / "bin" / "transformers"), "serve", model]
        argv += ["--continuous-batching", "--device", "cpu", "--dtype", "bfloat16"]
        # Left to itself it takes most of the machine's memory for its cache.
        argv += ["--cb-block-size", str(self.PAGE_TOKENS), "--cb-num-blocks", str(num_pages)]
        argv += ["--host", "127.0.0.1", "--port", str(port)]
        env = {**OFFLINE, "OMP_NUM_THREADS": str(len(self.setup.cores))}
        self.commands = [Command(argv=tuple(argv), env=env, log=self.log())]
        self.processes.spawn(self.commands[0])
        self._client = CompletionsClient(f"http://127.0.0.1:{port}")
        self.connections.push_async_callback(self._client.close)
        await self.wait_ready(self._client.is_healthy)

    async def answer(self, prompt: Prompt, output_tokens: int) -> Answer:
        # No other field of its API turns the end-of-sequence token off.
        generation = {"eos_token_id": -1, "do_sample": False, "max_new_tokens": output_tokens}
        body: dict[str, Json] = {
            "model": str(self.setup.model_dir),
            "prompt": prompt.text,
            "max_tokens": output_tokens,
            "generation_config": json.dumps(generation),
        }
        return await self._client.stream(body)

    def versions(self) -> dict[str, str]:
        return TRANSFORMERS.versions(self.setup.venv_root)
