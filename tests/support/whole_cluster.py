"""A real deployment (Ray, workers, NIXL, gRPC) inside the test process, on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from coordinator.snapshot import CoordinatorSnapshot, WorkerSnapshot
from pdserve.client import Client
from pdserve.core.config import ServeConfig
from pdserve.core.ids import WorkerId
from pdserve.launch import Deployment, deployed
from tests.support.tokenizers_files import byte_level_dir

T = TypeVar("T")

_START_S = 120.0


class RunningDeployment:
    """Starts in `with`; everything is stopped on leaving, and an error of the stop fails the test."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._deployment: Deployment | None = None
        self._thread = threading.Thread(target=self._main, name="deployment")

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_START_S):
            raise TimeoutError(f"the deployment was not ready within {_START_S:g} s")
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the deployment does not stop"
        if self._failure is not None:
            raise self._failure

    @property
    def deployment(self) -> Deployment:
        assert self._deployment is not None
        return self._deployment

    def client(self) -> Client:
        return Client(self.deployment.grpc, timeout_s=120)

    def on_loop(self, call: Callable[[], T]) -> T:
        """Run `call` where the coordinator runs."""

        async def run() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def snapshot(self) -> CoordinatorSnapshot:
        return self.on_loop(self.deployment.coordinator.snapshot)

    def worker(self, name: str) -> WorkerSnapshot | None:
        return next((worker for worker in self.snapshot().workers if worker.id == name), None)

    def pid(self, name: str) -> int:
        return self.on_loop(self.deployment.supervisor.pids)[WorkerId(name)]

    def wait_until(self, what: str, condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
        """Look until `condition` holds; nothing in another process tells us when to look."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s; {self.snapshot()}")
            time.sleep(0.02)

    def idle(self) -> bool:
        """No request lives, and every block of every worker is free or cached, by what they said last."""
        now = self.snapshot()
        beats = [worker.heartbeat for worker in now.workers]
        return (
            now.active == now.waiting == now.unsettled == 0
            and all(worker.placed == 0 for worker in now.workers)
            and all(
                beat is not None
                and beat.blocks.conserved
                and beat.blocks.held == beat.blocks.quarantined == 0
                and beat.running == beat.waiting == 0
                for beat in beats
            )
        )

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # the test's thread raises it
            self._failure = error
        finally:
            self._loop.close()
            self._ready.set()

    async def _serve(self) -> None:
        async with deployed(self._config, _silent) as deployment:
            self._deployment = deployment
            self._ready.set()
            await self._stop.wait()


def make_tiny_checkpoint(folder: Path, *, max_position: int = 2048, seed: int = 5) -> PreTrainedModel:
    """A random Llama with a byte tokenizer in `folder`; returns transformers' own float32 model of it."""
    torch.manual_seed(seed)
    byte_level_dir(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=max_position,
        initializer_range=0.3,
        eos_token_id=319,
        tie_word_embeddings=False,
    )
    oracle: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    oracle.save_pretrained(folder)
    return oracle


def greedy(oracle: PreTrainedModel, prompt: list[int], count: int, *, ignore_eos: bool = False) -> list[int]:
    """What transformers writes after `prompt`, up to and including EOS unless that is ignored."""
    settings = oracle.generation_config
    assert settings is not None
    eos = settings.eos_token_id
    settings.eos_token_id = None if ignore_eos else eos
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        out = oracle.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
    settings.eos_token_id = eos
    return [int(token) for token in out[0, len(prompt) :]]


def _silent(what: str, text: str, fraction: float | None = None) -> None:
    pass
