"""Prefill and decode workers reduced to the protocol of `pdserve.core.messages`: no model, no time, no I/O.

A token follows from the tokens before it, so every attempt at a request must give the same answer. Each check
in here is a promise of the coordinator: breaking it raises AssertionError.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.layout import CacheGroup, Fingerprint, GroupLayout, blocks_for
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    ConnectPeer,
    Down,
    Drain,
    DropPeer,
    FinishReason,
    Heartbeat,
    Hello,
    KvArrived,
    Migrate,
    Orphaned,
    Preempt,
    Preempted,
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    RefusalReason,
    Refused,
    RenewLease,
    RequestSpec,
    Reserved,
    Role,
    StartDecode,
    StartPrefill,
    Tokens,
    TransferDone,
    Undrain,
    Up,
    WorkerInfo,
)
from pdserve.core.sampling import TokenLogprobs
from pdserve.core.worker_state import BlockCounts

VOCAB = 256
EOS = 0
FIRST, LAST = ord("a"), ord("z")
"""Scripted tokens are bytes, so that answers are readable."""

LAYOUT = GroupLayout(
    group=CacheGroup(name="full", num_layers=2, num_kv_heads=1, head_dim=8, dtype="float32"), block_tokens=4
)
FINGERPRINT = Fingerprint(protocol=1, model="scripted", layouts=(LAYOUT,))


def next_token(tokens: list[int]) -> int:
    """What the scripted model says after `tokens`."""
    mixed = 0
    for token in tokens[-8:]:
        mixed = (mixed * 31 + token + 7) % 1_000_003
    return FIRST + (mixed + len(tokens)) % (LAST - FIRST + 1)


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def finish_reason(spec: RequestSpec, output: list[int]) -> FinishReason | None:
    ends = output[-1] in spec.sampling.stop_token_ids
    if ends or (output[-1] in spec.eos_token_ids and not spec.sampling.ignore_eos):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(output) >= spec.sampling.max_tokens else None


def logprobs_of(spec: RequestSpec, token: int) -> TokenLogprobs | None:
    k = spec.sampling.logprobs
    return None if k is None else TokenLogprobs(token, -0.5, tuple((token, -0.5) for _ in range(k)))


def worker_info(
    name: str,
    role: Role,
    *,
    epoch: int = 1,
    num_blocks: int = 64,
    max_num_seqs: int = 16,
    max_model_len: int = 512,
) -> WorkerInfo:
    return WorkerInfo(
        worker=WorkerId(name),
        role=role,
        epoch=epoch,
        pid=1,
        host="test",
        fingerprint=FINGERPRINT,
        transfer_metadata=name.encode(),
        num_blocks=num_blocks,
        block_tokens=LAYOUT.block_tokens,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
    )


@dataclass
class _Reservation:
    spec: RequestSpec
    prefill: WorkerId | None
    blocks: list[BlockId]
    output: list[int]
    awaits_kv: bool
    quarantined: bool = False
    runs: bool = False
    writer_epoch: int = 0
    moving: Migrate | None = None
    """Paused: its KV is on the way to, or at, another decode worker."""


class ModelDecode:
    """Reserves, waits for KV, writes one token per request and `step`."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.reservations: dict[AttemptId, _Reservation] = {}
        self.peers: set[tuple[WorkerId, int]] = set()
        self.free = [BlockId(i) for i in range(info.num_blocks)]
        self.refuse_next = 0
        self.pushes: list[ModelPush] = []
        self.moves: dict[AttemptId, AttemptId] = {}
        """By the attempt's name there: those whose last word has not been said."""
        self.draining = False

    def handle(self, message: Down) -> list[Up]:
        match message:
            case StartDecode():
                return self._start(message)
            case Cancel(attempt=attempt):
                held = self.reservations.get(attempt)
                if held is None:
                    return self._move_cancelled(attempt)
                if held.awaits_kv:
                    held.quarantined, held.runs = True, False
                else:
                    self._release(attempt)
            case Preempt(attempt=attempt):
                held = self.reservations.get(attempt)
                if held is not None and held.runs and not held.awaits_kv:
                    self._release(attempt)
                    return [Preempted(attempt=attempt)]
            case Migrate():
                return self._migrate(message)
            case PushesSettled(attempt=attempt):
                held = self.reservations.get(attempt)
                if held is not None:
                    assert held.quarantined, f"{attempt}: settled before it was cancelled"
                    self._release(attempt)
            case DropPeer(peer=peer, epoch=epoch):
                self.peers.discard((peer, epoch))
                for attempt, held in list(self.reservations.items()):
                    if held.prefill == peer and held.awaits_kv:
                        assert held.quarantined, f"{attempt}: its peer is gone and nobody cancelled it"
                        self._release(attempt)
            case ConnectPeer(peer=peer, epoch=epoch):
                self.peers.add((peer, epoch))
            case RenewLease(attempt=attempt):
                pass
            case Drain():
                self.draining = True
            case Undrain():
                self.draining = False
            case Hello():
                pass
            case StartPrefill():
                raise AssertionError("a decode worker was told to prefill")
        return []

    def _migrate(self, order: Migrate) -> list[Up]:
        """The whole KV goes with one push; the sequence waits here for what becomes of it."""
        known = (order.decode_worker, order.decode_epoch) in self.peers
        assert known, f"{order.to}: {order.decode_worker} was never introduced"
        held = self.reservations.get(order.attempt)
        if held is None or not held.runs or held.moving is not None:
            failed = AttemptFailed(attempt=order.to, code="RESOURCE_EXHAUSTED", message="", retryable=True)
            return [failed, PushesSettled(attempt=order.to)]
        tokens = held.spec.tokens + held.output
        assert order.num_tokens < len(tokens)
        held.moving, held.runs = order, False
        self.moves[order.to] = order.attempt
        self.pushes.append(
            ModelPush(
                self.info.worker,
                order.decode_worker,
                order.decode_epoch,
                order.to,
                tokens[-1],
                tokens[order.num_tokens : -1],
            )
        )
        return []

    def _move_cancelled(self, to: AttemptId) -> list[Up]:
        for held in self.reservations.values():
            if held.moving is not None and held.moving.to == to:
                held.moving, held.runs = None, True
        return [] if to in self.moves else [PushesSettled(attempt=to)]

    def move_landed(self, to: AttemptId) -> list[Up]:
        """A push from here has ended, well or not."""
        attempt = self.moves.pop(to, None)
        if attempt is None:
            return []
        held = self.reservations.get(attempt)
        if held is not None and held.moving is None:
            return [PushesSettled(attempt=to)]
        return [TransferDone(attempt=to, bytes_moved=4096, exposed_s=0.015625, busy_s=0.25, path="fake")]

    def _start(self, message: StartDecode) -> list[Up]:
        spec, attempt = message.spec, message.spec.attempt
        if self.draining:
            return [Refused(attempt=attempt, reason=RefusalReason.DRAINING, detail="")]
        assert attempt not in self.reservations, f"{attempt}: started twice"
        assert message.prefill_worker is None or any(
            peer == message.prefill_worker for peer, _ in self.peers
        ), f"{attempt}: {message.prefill_worker} was never introduced"
        wanted = blocks_for(len(spec.tokens) + 1, self.info.block_tokens)
        if self.refuse_next or wanted > len(self.free):
            self.refuse_next = max(self.refuse_next - 1, 0)
            return [Refused(attempt=attempt, reason=RefusalReason.NO_BLOCKS, detail=f"wanted {wanted}")]
        if len(self.reservations) >= self.info.max_num_seqs:
            return [Refused(attempt=attempt, reason=RefusalReason.BATCH_FULL, detail="")]
        blocks, self.free = self.free[:wanted], self.free[wanted:]
        colocated = message.prefill_worker is None
        self.reservations[attempt] = _Reservation(
            spec, message.prefill_worker, blocks, [], awaits_kv=not colocated, runs=colocated
        )
        known = [epoch for peer, epoch in self.peers if peer == message.prefill_worker]
        self.reservations[attempt].writer_epoch = max(known, default=0)
        return [Reserved(attempt=attempt, blocks=blocks, cached_tokens=0)]

    def push_landed(self, attempt: AttemptId, first_token: int, before: Sequence[int] = ()) -> list[Up]:
        held = self.reservations.get(attempt)
        assert held is not None, f"{attempt}: a write landed in blocks that were given back"
        if held.quarantined:
            return []
        held.awaits_kv, held.runs = False, True
        held.output += [*before, first_token]
        up: list[Up] = [KvArrived(attempt=attempt)]
        return up + self._tell(attempt, held, [*before, first_token])

    def fail(self, attempt: AttemptId, *, retryable: bool = True) -> list[Up]:
        """Give an attempt up: a lease that ran out, a step that broke."""
        held = self.reservations[attempt]
        if held.awaits_kv:
            held.quarantined, held.runs = True, False
        else:
            self._release(attempt)
        return [AttemptFailed(attempt=attempt, code="UNAVAILABLE", message="cable", retryable=retryable)]

    def connection_lost(self) -> None:
        for attempt, held in list(self.reservations.items()):
            if held.awaits_kv:
                held.quarantined, held.runs = True, False
            else:
                self._release(attempt)

    def orphans(self) -> list[Up]:
        """What it tells a coordinator that it meets."""
        return [
            Orphaned(attempt=attempt, writer=held.prefill, writer_epoch=held.writer_epoch)
            for attempt, held in self.reservations.items()
            if held.quarantined and held.prefill is not None
        ]

    def step(self) -> list[Up]:
        up: list[Up] = []
        for attempt, held in list(self.reservations.items()):
            if held.runs:
                token = next_token(held.spec.tokens + held.output)
                held.output.append(token)
                up += self._tell(attempt, held, [token])
        return up

    def _tell(self, attempt: AttemptId, held: _Reservation, tokens: list[int]) -> list[Up]:
        spec = held.spec
        reason = finish_reason(spec, spec.tokens[spec.num_prompt_tokens :] + held.output)
        if reason is not None:
            self._release(attempt)
        logprobs = [entry for token in tokens if (entry := logprobs_of(spec, token)) is not None]
        first = spec.num_output_tokens + len(held.output) - len(tokens)
        return [
            Tokens(attempt=attempt, first_index=first, tokens=tokens, logprobs=logprobs, finish_reason=reason)
        ]

    def _release(self, attempt: AttemptId) -> None:
        self.free += self.reservations.pop(attempt).blocks

    @property
    def busy(self) -> bool:
        return any(held.runs for held in self.reservations.values())

    def heartbeat(self) -> Heartbeat:
        quarantined = sum(len(r.blocks) for r in self.reservations.values() if r.quarantined)
        return dataclasses.replace(
            _heartbeat(self.info, len(self.free), quarantined, len(self.reservations)), draining=self.draining
        )


@dataclass
class _Reading:
    start: StartPrefill
    stages: deque[str] = field(default_factory=lambda: deque(["start", "chunk", "push", "done", "transfer"]))


@dataclass(frozen=True)
class ModelPush:
    """The last push of an attempt, with the hand-over."""

    prefill: WorkerId
    decode: WorkerId
    decode_epoch: int
    attempt: AttemptId
    first_token: int
    before: Sequence[int] = ()
    """Of a move: tokens that came since the target's blocks were reserved."""


class ModelPrefill:
    """Reads prompts in five stages; `push_first` says whether the KV leaves before the first token does."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.readings: dict[AttemptId, _Reading] = {}
        self.peers: set[tuple[WorkerId, int]] = set()
        self.pushes: list[ModelPush] = []
        self.in_flight: set[AttemptId] = set()

    def handle(self, message: Down) -> list[Up]:
        match message:
            case StartPrefill(spec=spec):
                assert spec.attempt not in self.readings, f"{spec.attempt}: started twice"
                known = (message.decode_worker, message.decode_epoch) in self.peers
                assert known, f"{spec.attempt}: {message.decode_worker} was never introduced"
                wanted = blocks_for(len(spec.tokens), self.info.block_tokens)
                assert len(message.dst_blocks) >= wanted, f"{spec.attempt}: too few blocks"
                self.readings[spec.attempt] = _Reading(message)
            case Cancel(attempt=attempt):
                return self._abandon(attempt)
            case ConnectPeer(peer=peer, epoch=epoch):
                self.peers.add((peer, epoch))
            case DropPeer(peer=peer, epoch=epoch):
                self.peers.discard((peer, epoch))
            case Hello() | Drain() | Undrain():
                pass
            case StartDecode() | RenewLease() | PushesSettled() | Migrate():
                raise AssertionError(f"a prefill worker was sent {message}")
        return []

    def connection_lost(self) -> None:
        for attempt in list(self.readings):
            self._abandon(attempt)

    def fail(self, attempt: AttemptId, *, retryable: bool = True) -> list[Up]:
        """Tell, then give it up like a cancelled one."""
        told: list[Up] = [
            AttemptFailed(attempt=attempt, code="UNAVAILABLE", message="cable", retryable=retryable)
        ]
        return told + self._abandon(attempt)

    def _abandon(self, attempt: AttemptId) -> list[Up]:
        reading = self.readings.get(attempt)
        if reading is not None and reading.stages[0] == "settle":
            return []  # its last word is to come
        self.readings.pop(attempt, None)
        if attempt not in self.in_flight:
            return [PushesSettled(attempt=attempt)]
        self.in_flight.discard(attempt)
        self.readings[attempt] = _Reading(_NO_START, deque(["settle"]))
        return []

    def step(self, attempt: AttemptId, landed: bool) -> list[Up]:
        """The next stage of one attempt. `landed`: none of its pushes is in flight."""
        reading = self.readings[attempt]
        stage = reading.stages[0]
        if stage in ("transfer", "settle") and not landed:
            return []
        reading.stages.popleft()
        if stage == "settle":
            del self.readings[attempt]
            return [PushesSettled(attempt=attempt)]
        spec = reading.start.spec
        token = next_token(spec.tokens)
        reason = finish_reason(spec, [*spec.tokens[spec.num_prompt_tokens :], token])
        match stage:
            case "start":
                return [PrefillStarted(attempt=attempt, cached_tokens=0, queue_s=0.25)]
            case "chunk":
                return [PrefillProgress(attempt=attempt, tokens_done=len(spec.tokens) // 2)]
            case "push":
                if reason is None:
                    start = reading.start
                    self.in_flight.add(attempt)
                    self.pushes.append(
                        ModelPush(self.info.worker, start.decode_worker, start.decode_epoch, attempt, token)
                    )
                return []
            case "done":
                prompt: list[TokenLogprobs | None] = []
                if spec.sampling.prompt_logprobs is not None:
                    prompt = [
                        None,
                        *(TokenLogprobs(t, -1.0) for t in spec.tokens[1 : spec.num_prompt_tokens]),
                    ]
                return [
                    PrefillDone(
                        attempt=attempt,
                        token=token,
                        logprobs=logprobs_of(spec, token),
                        prompt_logprobs=prompt,
                        finish_reason=reason,
                        compute_s=0.5,
                    )
                ]
        self.in_flight.discard(attempt)
        del self.readings[attempt]
        return [TransferDone(attempt=attempt, bytes_moved=4096, exposed_s=0.015625, busy_s=0.25, path="fake")]

    def heartbeat(self) -> Heartbeat:
        return _heartbeat(self.info, self.info.num_blocks, 0, len(self.readings))


_NO_START = StartPrefill(
    spec=RequestSpec(
        attempt=AttemptId("", 0),  # type: ignore[arg-type]  # a placeholder nobody reads
        tokens=[],
        num_prompt_tokens=0,
        sampling=None,  # type: ignore[arg-type]
        eos_token_ids=(),
        cache_salt=b"",
        arrival=0.0,
    ),
    decode_worker=WorkerId(""),
    decode_epoch=0,
    dst_blocks=[],
    dst_cached_tokens=0,
    transfer_deadline_s=0.0,
)


def _heartbeat(info: WorkerInfo, free: int, quarantined: int, running: int) -> Heartbeat:
    total = info.num_blocks
    counts = BlockCounts(
        total=total, free=free, held=total - free - quarantined, cached=0, quarantined=quarantined
    )
    return Heartbeat(
        worker=info.worker,
        epoch=info.epoch,
        blocks=counts,
        waiting=0,
        running=running,
        waiting_tokens=0,
        step_s=0.01,
        tokens_per_s=1000.0,
        prefix_hit_tokens=0,
        prefix_query_tokens=0,
        steps=1,
    )
