"""A coordinator of a few lines, over the real channel, for tests of workers: no routing, no retries."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from pdserve.core.channel import Channel, connect
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    ConnectPeer,
    FinishReason,
    Heartbeat,
    Hello,
    Message,
    PrefillDone,
    PushesSettled,
    Refused,
    RequestSpec,
    Reserved,
    Role,
    StartDecode,
    StartPrefill,
    Tokens,
    TransferDone,
    WorkerInfo,
)
from pdserve.core.sampling import SamplingParams
from pdserve.core.worker_state import PrefixEvents
from pdserve.worker.events import attempt_of

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=8)
_NAMES = itertools.count()
_M = TypeVar("_M", bound=Message)


@dataclass(slots=True)
class Answer:
    """Everything that was said about one attempt."""

    spec: RequestSpec
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    failed: AttemptFailed | None = None
    aborted: bool = False
    refused: Refused | None = None
    messages: list[tuple[WorkerId, Message]] = field(default_factory=list)

    def said(self, kind: type[_M]) -> list[_M]:
        return [message for _, message in self.messages if isinstance(message, kind)]


class Driver:
    """`async with Driver(addresses) as driver:` connects to workers and introduces them to each other."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._channels: dict[WorkerId, Channel] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._inboxes: dict[AttemptId, asyncio.Queue[tuple[WorkerId, Message] | None]] = {}
        self._name = f"driver-{next(_NAMES)}"
        self._ids = itertools.count()
        self.infos: dict[WorkerId, WorkerInfo] = {}
        self.heartbeats: dict[WorkerId, list[Heartbeat]] = {}
        self.prefix_events: list[PrefixEvents] = []
        self._heard = asyncio.Condition()
        self.strays: list[Message] = []
        """Messages about attempts that nobody asks for any more."""

    async def __aenter__(self) -> Driver:
        for address in self._addresses:
            await self._meet(await connect(address))
        for mine, its in itertools.permutations(self.infos.values(), 2):
            if mine.role is not its.role:
                self.introduce(mine.worker, its)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()

    def send(self, worker: WorkerId, *messages: Message) -> None:
        self._channels[worker].send(messages)

    def introduce(self, to: WorkerId, info: WorkerInfo) -> None:
        self.send(
            to,
            ConnectPeer(
                peer=info.worker,
                epoch=info.epoch,
                fingerprint=info.fingerprint,
                metadata=info.transfer_metadata,
            ),
        )

    def the(self, role: Role) -> WorkerId:
        (found,) = [info.worker for info in self.infos.values() if info.role is role]
        return found

    def spec(self, tokens: Sequence[int], params: SamplingParams = GREEDY, **fields: object) -> RequestSpec:
        values: dict[str, object] = {
            "attempt": AttemptId(RequestId(f"{self._name}-{next(self._ids)}"), 0),
            "tokens": list(tokens),
            "num_prompt_tokens": len(tokens),
            "sampling": params,
            "eos_token_ids": (),
            "cache_salt": b"",
            "arrival": time.time(),
        }
        return RequestSpec(**{**values, **fields})  # type: ignore[arg-type]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Wait for messages until `condition` holds."""
        async with asyncio.timeout(timeout_s), self._heard:
            await self._heard.wait_for(condition)

    def abort(self, spec: RequestSpec) -> None:
        """The client of a request that is being asked goes away."""
        inbox = self._inboxes.get(spec.attempt)
        if inbox is not None:
            inbox.put_nowait(None)

    async def ask(
        self,
        spec: RequestSpec,
        *,
        colocated: bool = False,
        lease_s: float = 20.0,
        transfer_deadline_s: float = 10.0,
        retry: bool = True,
    ) -> Answer:
        """Take one attempt through its life; returns when nothing of it is under way any more."""
        inbox: asyncio.Queue[tuple[WorkerId, Message] | None] = asyncio.Queue()
        self._inboxes[spec.attempt] = inbox
        try:
            prefill = None if colocated else self.the(Role.PREFILL)
            return await _Conversation(
                self, spec, inbox, prefill, self.the(Role.DECODE), lease_s, transfer_deadline_s, retry
            ).run()
        finally:
            del self._inboxes[spec.attempt]

    async def generate(
        self, tokens: Sequence[int], params: SamplingParams = GREEDY, *, colocated: bool = False
    ) -> list[int]:
        answer = await self.ask(self.spec(tokens, params), colocated=colocated)
        assert answer.failed is None, answer.failed
        return answer.tokens

    async def _meet(self, channel: Channel) -> None:
        channel.send([Hello(protocol=PROTOCOL_VERSION, sender="test")])
        batch: list[Message] = []
        while len(batch) < 2:
            more = await channel.receive()
            assert more is not None, "the worker hung up"
            batch += more
        assert isinstance(batch[0], Hello)
        info = batch[1]
        assert isinstance(info, WorkerInfo)
        self.infos[info.worker] = info
        self.heartbeats[info.worker] = [m for m in batch[2:] if isinstance(m, Heartbeat)]
        self._channels[info.worker] = channel
        self._readers.append(asyncio.create_task(self._read(info.worker, channel)))

    async def _read(self, worker: WorkerId, channel: Channel) -> None:
        while (batch := await channel.receive()) is not None:
            for message in batch:
                if isinstance(message, Heartbeat):
                    self.heartbeats[worker].append(message)
                    continue
                if isinstance(message, PrefixEvents):
                    self.prefix_events.append(message)
                    continue
                attempt = attempt_of(message)
                inbox = self._inboxes.get(attempt) if attempt is not None else None
                if inbox is None:
                    self.strays.append(message)
                else:
                    inbox.put_nowait((worker, message))
            async with self._heard:
                self._heard.notify_all()


class _Conversation:
    def __init__(
        self,
        driver: Driver,
        spec: RequestSpec,
        inbox: asyncio.Queue[tuple[WorkerId, Message] | None],
        prefill: WorkerId | None,
        decode: WorkerId,
        lease_s: float,
        transfer_deadline_s: float,
        retry: bool,
    ) -> None:
        self._driver, self._spec, self._inbox = driver, spec, inbox
        self._prefill, self._decode = prefill, decode
        self._lease_s, self._transfer_deadline_s, self._retry = lease_s, transfer_deadline_s, retry
        self._answer = Answer(spec)
        self._open = False
        """StartPrefill was sent, and its last word has not come."""
        self._ended = False

    async def run(self) -> Answer:
        self._start()
        while not self._ended or self._open:
            item = await self._inbox.get()
            if item is None:
                if not self._ended:
                    self._answer.aborted = True
                    self._end()
                continue
            worker, message = item
            self._answer.messages.append(item)
            await self._heard(worker, message)
        return self._answer

    def _start(self) -> None:
        message = StartDecode(spec=self._spec, prefill_worker=self._prefill, lease_s=self._lease_s)
        self._driver.send(self._decode, message)

    async def _heard(self, worker: WorkerId, message: Message) -> None:
        answer = self._answer
        match message:
            case TransferDone() | PushesSettled():
                self._open = False
                if isinstance(message, PushesSettled) or self._ended:
                    self._driver.send(self._decode, PushesSettled(attempt=self._spec.attempt))
            case _ if self._ended:
                pass
            case Reserved() if self._prefill is not None:
                self._open = True
                self._driver.send(self._prefill, self._start_prefill(message))
            case Refused() if self._retry:
                await asyncio.sleep(0.002)  # the pause of a client that tries again
                self._start()
            case Refused():
                answer.refused = message
                self._ended = True
            case PrefillDone():
                self._append(self._spec.num_output_tokens, [message.token])
                if message.finish_reason is not None:
                    answer.finish = message.finish_reason
                    self._end()
            case Tokens():
                self._append(message.first_index, message.tokens)
                if message.finish_reason is not None:
                    answer.finish = message.finish_reason
                    self._ended = True
            case AttemptFailed():
                answer.failed = message
                self._end()
            case _:
                pass

    def _start_prefill(self, reserved: Reserved) -> StartPrefill:
        return StartPrefill(
            spec=self._spec,
            decode_worker=self._decode,
            decode_epoch=self._driver.infos[self._decode].epoch,
            dst_blocks=reserved.blocks,
            dst_cached_tokens=reserved.cached_tokens,
            transfer_deadline_s=self._transfer_deadline_s,
        )

    def _append(self, first_index: int, tokens: list[int]) -> None:
        known = len(self._answer.tokens) + self._spec.num_output_tokens - first_index
        assert known >= 0, "tokens went missing"
        assert self._answer.tokens[first_index - self._spec.num_output_tokens :][: len(tokens)] in (
            [],
            tokens[:known],
        ), "both workers say the same first token"
        self._answer.tokens += tokens[known:]

    def _end(self) -> None:
        """Take back whatever the attempt had placed."""
        self._ended = True
        cancel = Cancel(attempt=self._spec.attempt, reason="test")
        self._driver.send(self._decode, cancel)
        if self._open and self._prefill is not None:
            self._driver.send(self._prefill, cancel)
        else:
            self._driver.send(self._decode, PushesSettled(attempt=self._spec.attempt))
