"""A serving system under test, and what one answer of it took."""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.processes import Command, ProcessSet
from benchmarks.workload import Prompt, Workload


class WrongAnswer(Exception):
    """A system read another number of prompt tokens, or wrote another number of tokens, than asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answered request, on the client's clock. Counts are the system's own."""

    sent_s: float
    first_s: float
    last_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, over the time they took."""
        return (self.output_tokens - 1) / (self.last_s - self.first_s)

    def check(self, prompt: Prompt, output_tokens: int) -> None:
        asked = (len(prompt.token_ids), output_tokens)
        counted = (self.prompt_tokens, self.output_tokens)
        if asked != counted:
            raise WrongAnswer(f"(prompt, output) tokens: asked for {asked}, the system counted {counted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a system is built from: the same for all."""

    model_dir: Path
    workload: Workload
    log_dir: Path
    cores: tuple[int, ...]
    kv_gib: int
    """KV cache per engine."""
    kv_bytes_per_token: int
    start_timeout_s: float
    venv_root: Path
    """Folder that holds the peers' virtual environments."""


class System(ABC):
    """Start, answer, stop. One is started once per run, or once per round."""

    name: ClassVar[str]
    describes: ClassVar[str]
    """One line for the report."""
    can_freeze: ClassVar[bool] = True
    """False where the system's own heartbeats would take a frozen process for a dead one."""
    estimated_gib: ClassVar[float]
    """Memory to set aside for it, when deciding which systems stay up between rounds."""
    stop_grace_s: ClassVar[float] = 20.0

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.processes = ProcessSet()
        self.commands: list[Command] = []
        self.connections = AsyncExitStack()
        """What `start` opened in this process; closed before the processes are ended."""

    @abstractmethod
    async def start(self) -> None:
        """Return when the system answers requests; bounded by `setup.start_timeout_s`."""

    @abstractmethod
    async def answer(self, prompt: Prompt, output_tokens: int) -> Answer:
        """One greedy answer of exactly `output_tokens` tokens, streamed."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of what does the work."""

    async def answer_all(self, prompts: Sequence[Prompt], output_tokens: int) -> list[Answer]:
        """All at once."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.answer(prompt, output_tokens)) for prompt in prompts]
        return [task.result() for task in tasks]

    async def stop(self) -> None:
        try:
            await self.connections.aclose()
        finally:
            await asyncio.to_thread(self.processes.stop, grace_s=self.stop_grace_s)

    async def wait_ready(self, is_ready: Callable[[], Awaitable[bool]]) -> None:
        """Ask until the server says yes, it dies (`ServerDied`), or its time is up (`TimeoutError`)."""
        async with asyncio.timeout(self.setup.start_timeout_s):
            while not await is_ready():
                self.processes.raise_if_dead()
                await asyncio.sleep(0.5)

    def log(self, suffix: str = "") -> Path:
        return self.setup.log_dir / f"{self.name}{suffix}.log"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
