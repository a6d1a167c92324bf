"""llama.cpp's own server on the same checkpoint, as a GGUF file in bf16: no weight is rounded again."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from benchmarks.openai_http import CompletionsClient, HttpError, Json
from benchmarks.peers import LLAMACPP, LLAMACPP_SOURCE, llama_server, llamacpp_source
from benchmarks.processes import Command, ServerDied, python_of
from benchmarks.system import Answer, System, free_port
from benchmarks.workload import Prompt


class LlamaCpp(System):
    """`llama-server`, a slot for every stream, its batching of streams on (the default)."""

    name: ClassVar[str] = "llamacpp"
    describes: ClassVar[str] = "llama.cpp's server on all cores, GGUF in bf16, a slot for every stream"
    estimated_gib: ClassVar[float] = 2.0

    SLOT_TOKENS: ClassVar[int] = 2048

    async def start(self) -> None:
        setup, port = self.setup, free_port()
        venv, cores = LLAMACPP.path(setup.venv_root), str(len(setup.cores))
        gguf = await asyncio.to_thread(to_gguf, setup.model_dir, setup.venv_root, self.log("-convert"))
        slots = setup.workload.streams
        fits = setup.kv_gib * 2**30 // setup.kv_bytes_per_token // slots
        argv = [str(llama_server(venv)), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
        argv += ["--threads", cores, "--threads-batch", cores, "--parallel", str(slots)]
        argv += ["--ctx-size", str(slots * min(fits, self.SLOT_TOKENS))]
        self.commands = [Command(argv=tuple(argv), env={}, log=self.log())]
        self.processes.spawn(self.commands[0])
        self._client = CompletionsClient(f"http://127.0.0.1:{port}")
        self.connections.push_async_callback(self._client.close)
        await self.wait_ready(self._client.is_healthy)

    async def answer(self, prompt: Prompt, output_tokens: int) -> Answer:
        body: dict[str, Json] = {
            "prompt": list(prompt.token_ids),
            "n_predict": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        sent_s = time.perf_counter()
        first_s = last_s = 0.0
        end: Mapping[str, Json] = {}
        async for event in self._client.events("/completion", body):
            if "error" in event:
                raise HttpError(str(event["error"])[:500])
            if event.get("tokens"):
                last_s = time.perf_counter()
                first_s = first_s or last_s
            end = event
        if not first_s:
            raise HttpError("the stream held no token")
        read, written = end.get("tokens_evaluated"), end.get("tokens_predicted")
        return Answer(
            sent_s=sent_s,
            first_s=first_s,
            last_s=last_s,
            prompt_tokens=read if isinstance(read, int) else 0,
            output_tokens=written if isinstance(written, int) else 0,
        )

    def versions(self) -> dict[str, str]:
        return {"llama.cpp": f"in {LLAMACPP_SOURCE}", **LLAMACPP.versions(self.setup.venv_root)}


def to_gguf(model_dir: Path, venv_root: Path, log: Path) -> Path:
    """The checkpoint as llama.cpp reads it, written once; what the converter says goes to `log`.

    Raises `ServerDied`.
    """
    venv = LLAMACPP.path(venv_root)
    config = (model_dir / "config.json").read_bytes()
    key = hashlib.sha256(str(model_dir.resolve()).encode() + config).hexdigest()[:16]
    made = venv / "models" / f"{model_dir.name}-{key}.gguf"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    unfinished = made.with_suffix(".part")
    argv = [python_of(venv), str(llamacpp_source(venv) / "convert_hf_to_gguf.py"), str(model_dir)]
    argv += ["--outtype", "bf16", "--outfile", str(unfinished)]
    with log.open("wb") as said:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        status = subprocess.run(argv, stdout=said, stderr=said, check=False, env=env).returncode
    if status:
        raise ServerDied(f"the checkpoint was not converted: exit status {status}, see {log}")
    unfinished.rename(made)
    return made
