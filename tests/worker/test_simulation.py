"""A prefill scheduler, two decode schedulers, a coordinator and a bad network in one thread, from one seed.

What may never happen: a push that lands in a block which is not waiting for it (it would write over another's
KV), a block that is lost, an attempt without its last word, a token that is not the one it should be.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from kvtransfer.protocol import NoteArrived, Outcome, Push, PushEnded
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    ConnectPeer,
    Hello,
    KvArrived,
    Message,
    Migrate,
    Orphaned,
    PrefillDone,
    PushesSettled,
    Refused,
    RenewLease,
    RequestSpec,
    Reserved,
    Role,
    StartDecode,
    StartPrefill,
    Tokens,
    TransferDone,
)
from pdserve.core.sampling import SamplingParams
from pdserve.core.worker_state import PrefixEvents
from pdserve.engine.batch import Sampled
from pdserve.engine.block_pool import HolderKind
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import (
    Action,
    CoordinatorLost,
    FromCoordinator,
    OwnerId,
    Send,
    SubmitPush,
    attempt_of,
)
from pdserve.worker.loop import Scheduler
from tests.support.schedulers import make_scheduler

BLOCK, LAYERS = 4, 4
NUM_TURNS = 3000


def seeds(first: int, count: int) -> list[int]:
    """Those that `make sim SEED=n` or `make sim SEEDS=m` asks for, or `count` from `first`."""
    if seed := os.environ.get("PDSERVE_SIM_SEED"):
        return [int(seed)]
    return list(range(first, first + int(os.environ.get("PDSERVE_SIM_SEEDS", count))))


LAYOUT = GroupLayout(
    group=CacheGroup(name="kv", num_layers=LAYERS, num_kv_heads=1, head_dim=2, dtype="float32"),
    block_tokens=BLOCK,
)
P, D, E = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("decode-1")
EOS = 2


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after `tokens`."""
    mixed = 0
    for token in tokens:
        mixed = (mixed * 31 + token + 7) % 1_000_003
    return EOS if mixed % 61 == 0 else 3 + mixed % 6


@dataclass(slots=True)
class Attempt:
    """What the coordinator knows."""

    spec: RequestSpec
    decode: WorkerId
    writer: WorkerId | None
    """Who fills its blocks; None: it reads the prompt itself."""
    tokens: list[int]
    """Of the request, with every token that was streamed; migrations share it."""
    moves: Attempt | None = None
    """The attempt that moves away, in a migration."""
    moving_to: Attempt | None = None
    opened: bool = False
    open: bool = False
    arrived: bool = False
    ended: bool = False
    last_words: list[Message] = field(default_factory=list)


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.prefill = make_scheduler(
            Role.PREFILL, worker=P, layout=LAYOUT, num_blocks=24, max_len=60, budget=12, max_num_seqs=4
        )
        self.decoders = {
            worker: make_scheduler(
                Role.DECODE,
                worker=worker,
                layout=LAYOUT,
                num_blocks=30,
                max_len=60,
                budget=12,
                max_num_seqs=4,
            )
            for worker in (D, E)
        }
        self.schedulers: dict[WorkerId, Scheduler] = {P: self.prefill, **self.decoders}
        self.owner = OwnerId(0)
        self.down: dict[WorkerId, deque[Message]] = {P: deque(), D: deque(), E: deque()}
        self.up: deque[tuple[WorkerId, Message]] = deque()
        self.flying: list[tuple[WorkerId, Push]] = []
        self.timed_out: set[tuple[WorkerId, int]] = set()
        self.notes: list[tuple[WorkerId, WorkerId, bytes]] = []
        self.attempts: dict[AttemptId, Attempt] = {}
        self.connected = True
        self.num_landed = self.num_arrived = self.num_failed = self.num_moved = 0
        fingerprint = Fingerprint(protocol=PROTOCOL_VERSION, model="m", layouts=(LAYOUT,))
        for to, peer in itertools.permutations(self.schedulers, 2):
            self.down[to].append(ConnectPeer(peer=peer, epoch=1, fingerprint=fingerprint, metadata=b""))
            self.deliver(to)
        self.say_hello()

    def say_hello(self) -> None:
        for queue in self.down.values():
            queue.append(Hello(protocol=PROTOCOL_VERSION, sender="test"))

    # --- the network --------------------------------------------------------------------------------

    def perform(self, worker: WorkerId, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                if self.connected:
                    self.up.append((worker, action.message))
            elif isinstance(action, SubmitPush):
                self.flying.append((worker, action.push))
        self.schedulers[worker].audit()

    def deliver(self, to: WorkerId) -> None:
        if self.down[to]:
            event = FromCoordinator(self.owner, self.down[to].popleft())
            self.perform(to, self.schedulers[to].handle(event, self.now))

    def end_a_push(self, how: str) -> None:
        sender, push = self.flying.pop(self.random.randrange(len(self.flying)))
        outcome = Outcome.COMPLETED if how == "lands" else Outcome.FAILED
        if how in ("lands", "fails after landing"):
            self.write(push)
            assert push.note is not None
            self.notes.append((sender, push.peer, push.note))
        elif how == "fails halfway":
            self.write(push)
        ended = PushEnded(id=push.id, outcome=outcome)
        self.perform(sender, self.schedulers[sender].handle(ended, self.now))

    def write(self, push: Push) -> None:
        """The bytes arrive: whose block is it?"""
        self.num_landed += 1
        for block in push.dst_blocks:
            kinds = {holder.kind for holder in self.decoders[push.peer]._shared.pool.holders(block)}
            waiting = kinds & {HolderKind.RECEIVER, HolderKind.QUARANTINE}
            assert waiting, f"push {push.id} wrote over block {block} of {kinds or 'nobody'}"

    def arrive(self) -> None:
        sender, to, note = self.notes.pop(self.random.randrange(len(self.notes)))
        if self.random.random() < 0.1:
            self.notes.append((sender, to, note))  # it will come again
        self.perform(to, self.decoders[to].handle(NoteArrived(peer=sender, note=note), self.now))

    # --- the workers --------------------------------------------------------------------------------

    def step_prefill(self) -> None:
        plan, actions = self.prefill.schedule(self.now)
        self.perform(P, actions)
        if plan is None:
            return
        if self.random.random() < 0.01:
            self.perform(P, self.prefill.fail_step(RuntimeError("boom"), self.now))
            return
        for first in (0, LAYERS // 2):
            self.perform(P, self.prefill.layers_done(plan, first, first + LAYERS // 2, self.now))
        results = [
            WorkResult(Sampled(next_token(chunk.run.spec.tokens), None) if chunk.final else None, [])
            for chunk in plan.chunks
        ]
        self.perform(P, self.prefill.complete(plan, results, self.now))

    def step_decode(self, worker: WorkerId) -> None:
        scheduler = self.decoders[worker]
        plan, actions = scheduler.schedule(self.now)
        self.perform(worker, actions)
        if plan is None:
            return
        if self.random.random() < 0.01:
            self.perform(worker, scheduler.fail_step(RuntimeError("boom"), self.now))
            return
        results = [
            WorkResult(Sampled(next_token(turn.run.tokens), None) if turn.final else None, [])
            for turn in plan.turns
        ]
        self.perform(worker, scheduler.complete(plan, results, self.now))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for sender, push in list(self.flying):
            if push.deadline <= self.now and (sender, push.id) not in self.timed_out:
                self.timed_out.add((sender, push.id))
                late = PushEnded(id=push.id, outcome=Outcome.TIMED_OUT)
                self.perform(sender, self.schedulers[sender].handle(late, self.now))
        for worker, scheduler in self.schedulers.items():
            self.perform(worker, scheduler.sweep(self.now))

    # --- the coordinator ----------------------------------------------------------------------------

    def submit(self) -> None:
        tokens = [self.random.randrange(2) for _ in range(self.random.randint(1, 28))]
        spec = RequestSpec(
            attempt=AttemptId(RequestId(f"r{len(self.attempts)}"), 0),
            tokens=list(tokens),
            num_prompt_tokens=1,
            sampling=SamplingParams(temperature=0.0, max_tokens=1000),
            eos_token_ids=(EOS,),
            cache_salt=b"",
            arrival=self.now,
            priority=self.random.randrange(3),
        )
        writer = None if self.random.random() < 0.2 else P
        self.offer(Attempt(spec, self.random.choice([D, D, E]), writer, tokens), ahead_tokens=0)

    def offer(self, attempt: Attempt, *, ahead_tokens: int) -> None:
        self.attempts[attempt.spec.attempt] = attempt
        lease_s = self.random.uniform(1, 20)
        self.down[attempt.decode].append(
            StartDecode(
                spec=attempt.spec, prefill_worker=attempt.writer, lease_s=lease_s, ahead_tokens=ahead_tokens
            )
        )

    def migrate(self) -> None:
        """A running request shall go on at the other decode worker."""
        running = [a for a in self.attempts.values() if a.arrived and not a.ended and a.moving_to is None]
        if not running:
            return
        source = self.random.choice(running)
        spec = dataclasses.replace(
            source.spec,
            attempt=AttemptId(source.spec.attempt.request, len(self.attempts)),
            tokens=source.tokens[:-1],
        )
        target = Attempt(spec, E if source.decode == D else D, source.decode, source.tokens, moves=source)
        source.moving_to = target
        self.offer(target, ahead_tokens=self.random.choice([BLOCK, 3 * BLOCK]))

    def end(self, attempt: Attempt) -> None:
        if attempt.ended:
            return
        attempt.ended = True
        if attempt.moving_to is not None:
            self.end(attempt.moving_to)
        if attempt.moves is not None and attempt.moves.moving_to is attempt:
            attempt.moves.moving_to = None
        cancel = Cancel(attempt=attempt.spec.attempt, reason="test")
        self.down[attempt.decode].append(cancel)
        if attempt.writer is not None and (attempt.open or (attempt.moves is not None and attempt.opened)):
            self.down[attempt.writer].append(cancel)
        if not attempt.open:
            self.down[attempt.decode].append(PushesSettled(attempt=attempt.spec.attempt))

    def hear(self) -> None:
        worker, message = self.up.popleft()
        if isinstance(message, PrefixEvents):
            return
        if isinstance(message, Orphaned):
            self.down[message.writer].append(Cancel(attempt=message.attempt, reason="orphan"))
            return
        attempt_id = attempt_of(message)
        assert attempt_id is not None
        attempt = self.attempts[attempt_id]
        match message:
            case TransferDone() | PushesSettled() if worker == attempt.writer:
                attempt.last_words.append(message)
                attempt.open = False
                if attempt.ended or isinstance(message, PushesSettled):
                    self.down[attempt.decode].append(PushesSettled(attempt=attempt_id))
            case TransferDone() | PushesSettled():
                pass  # a decode worker knows nothing of an attempt that was cancelled
            case _ if attempt.ended:
                pass
            case Reserved() if attempt.writer is not None:
                attempt.opened = attempt.open = True
                self.down[attempt.writer].append(self.start_of_pushes(attempt, message))
                lease = RenewLease(attempt=attempt_id, lease_s=self.random.uniform(1, 10))
                self.down[attempt.decode].append(lease)
            case Refused():
                attempt.ended = True
                if attempt.moves is not None:
                    attempt.moves.moving_to = None
            case PrefillDone():
                self.check(attempt, attempt.spec.num_output_tokens, [message.token])
                if message.finish_reason is not None:
                    self.end(attempt)
            case Tokens():
                self.check(attempt, message.first_index, message.tokens)
                if message.finish_reason is not None:
                    attempt.ended = True
                    if attempt.moving_to is not None:
                        self.end(attempt.moving_to)
            case KvArrived():
                self.num_arrived += 1
                attempt.arrived = True
                if attempt.moves is not None:
                    self.num_moved += 1
                    attempt.moves.moving_to = None
                    self.end(attempt.moves)
            case AttemptFailed():
                self.num_failed += 1
                self.end(attempt)
            case _:
                pass

    def check(self, attempt: Attempt, first_index: int, tokens: list[int]) -> None:
        """Whoever says it: no token is missing, and each is the one that had to come."""
        start = attempt.spec.num_prompt_tokens + first_index
        assert start <= len(attempt.tokens), f"tokens are missing before {first_index}"
        for index, token in enumerate(tokens, start):
            assert token == next_token(attempt.tokens[:index])
            if index == len(attempt.tokens):
                attempt.tokens.append(token)

    def start_of_pushes(self, attempt: Attempt, reserved: Reserved) -> StartPrefill | Migrate:
        deadline_s = self.random.uniform(1, 10)
        if attempt.moves is None:
            return StartPrefill(
                spec=attempt.spec,
                decode_worker=attempt.decode,
                decode_epoch=1,
                dst_blocks=reserved.blocks,
                dst_cached_tokens=reserved.cached_tokens,
                transfer_deadline_s=deadline_s,
            )
        return Migrate(
            attempt=attempt.moves.spec.attempt,
            to=attempt.spec.attempt,
            num_tokens=len(attempt.spec.tokens),
            decode_worker=attempt.decode,
            decode_epoch=1,
            dst_blocks=reserved.blocks,
            dst_cached_tokens=reserved.cached_tokens,
            transfer_deadline_s=deadline_s,
        )

    def lose_the_coordinator(self) -> None:
        self.connected = False
        for queue in (*self.down.values(), self.up):
            queue.clear()
        for worker, scheduler in self.schedulers.items():
            self.perform(worker, scheduler.handle(CoordinatorLost(self.owner), self.now))
        self.owner = OwnerId(self.owner + 1)

    # --- a life -------------------------------------------------------------------------------------

    def turn(self, *, calm: bool) -> None:
        """One thing happens, somewhere. Calm: no new requests and cancels, and time stands still."""
        draw = self.random.random()
        if not calm and draw < 0.012:
            self.submit()
        elif not calm and draw < 0.016 and self.attempts:
            self.end(self.random.choice(list(self.attempts.values())[-12:]))
        elif not calm and draw < 0.04:
            self.migrate()
        elif draw < 0.046 and self.flying:
            self.end_a_push(self.random.choice(["fails", "fails halfway", "fails after landing"]))
        elif not calm and draw < 0.06:
            self.pass_time(self.random.uniform(0, 0.5))
        elif draw < 0.25 and self.flying:
            self.end_a_push("lands")
        elif draw < 0.38 and self.notes:
            self.arrive()
        elif draw < 0.46:
            self.deliver(P)
        elif draw < 0.64:
            self.deliver(self.random.choice([D, E]))
        elif draw < 0.82 and self.up:
            for _ in range(min(len(self.up), 3)):
                self.hear()
        elif draw < 0.92:
            self.step_prefill()
        else:
            self.step_decode(self.random.choice([D, E]))

    def settle_down(self) -> None:
        for attempt in self.attempts.values():
            self.end(attempt)
        for _ in range(20_000):
            idle = not (self.up or self.flying or self.notes or any(self.down.values()))
            if idle:
                return
            self.turn(calm=True)
        raise AssertionError("it never comes to rest")

    @property
    def held(self) -> int:
        counts = [scheduler.heartbeat().blocks for scheduler in self.schedulers.values()]
        assert all(count.conserved for count in counts)
        return sum(count.held + count.quarantined for count in counts)


@pytest.mark.parametrize("seed", seeds(0, 25))
def test_no_push_hits_a_foreign_block_and_every_block_comes_back(seed: int) -> None:
    world = World(seed)
    for _ in range(NUM_TURNS):
        world.turn(calm=False)
    opened = [attempt for attempt in world.attempts.values() if attempt.open]
    world.settle_down()
    assert world.held == 0
    assert not any(attempt.open for attempt in opened)
    assert world.num_landed > 20
    assert world.num_arrived >= 1
    assert world.num_failed >= 1
    assert world.num_moved >= 1


@pytest.mark.parametrize("seed", seeds(100, 15))
def test_losing_the_coordinator_at_any_moment_corrupts_nothing(seed: int) -> None:
    world = World(seed)
    for _ in range(world.random.randint(20, 600)):
        world.turn(calm=False)
    world.lose_the_coordinator()
    world.settle_down()
    # The next one is told what waits in quarantine, and asks those who may write there.
    world.connected = True
    world.say_hello()
    world.settle_down()
    assert world.held == 0
