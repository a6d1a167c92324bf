"""The decode scheduler alone: no engine, no threads, a clock that is an argument."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest

from decode.reception import GONE_PEER_GRACE_S
from kvtransfer.protocol import NoteArrived, PeerFailed
from pdserve.core.codec import encode
from pdserve.core.errors import Overloaded
from pdserve.core.handover import HANDOVER_VERSION, Handover, PushNote
from pdserve.core.ids import AttemptId, BlockId, RequestId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    ConnectPeer,
    Drain,
    DropPeer,
    FinishReason,
    KvArrived,
    Message,
    Preempt,
    Preempted,
    PushesSettled,
    RefusalReason,
    Refused,
    RenewLease,
    RequestSpec,
    Reserved,
    Role,
    StartDecode,
    Tokens,
)
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import Sampled, SampleFailed
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import Action, CoordinatorLost, FromCoordinator, OwnerId, Send
from tests.support.schedulers import make_scheduler

BLOCK = 4
LAYOUT = GroupLayout(
    group=CacheGroup(name="kv", num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32"),
    block_tokens=BLOCK,
)
PREFILL, OWNER = WorkerId("prefill-0"), OwnerId(1)


class Bench:
    """A scheduler, what it said, and a "model" that answers every row with the same token."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        max_num_seqs: int = 4,
        budget: int = 16,
        gather: int | None = None,
    ) -> None:
        self.scheduler = make_scheduler(
            Role.DECODE,
            layout=LAYOUT,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            budget=budget,
            gather=gather,
        )
        self.sent: list[Message] = []
        self.meet(1)

    def meet(self, epoch: int) -> None:
        fingerprint = Fingerprint(protocol=PROTOCOL_VERSION, model="m", layouts=(LAYOUT,))
        self.tell(ConnectPeer(peer=PREFILL, epoch=epoch, fingerprint=fingerprint, metadata=b""))

    def do(self, actions: Sequence[Action]) -> None:
        self.sent += [action.message for action in actions if isinstance(action, Send)]
        self.scheduler.audit()

    def tell(self, message: Message, now: float = 0.0, owner: OwnerId = OWNER) -> None:
        self.do(self.scheduler.handle(FromCoordinator(owner, message), now))

    def start(
        self,
        name: str,
        num_tokens: int,
        *,
        remote: bool = True,
        max_tokens: int = 8,
        seed: int = 0,
        **fields: object,
    ) -> AttemptId:
        attempt = AttemptId(RequestId(name), 0)
        tokens = [1000 * (seed or zlib.crc32(name.encode()) % 1000) + i for i in range(num_tokens)]
        spec_fields: dict[str, object] = {"arrival": 0.0, **fields}
        spec = RequestSpec(
            attempt=attempt,
            tokens=tokens,
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
            eos_token_ids=(),
            cache_salt=b"",
            **spec_fields,  # type: ignore[arg-type]
        )
        self.tell(StartDecode(spec=spec, prefill_worker=PREFILL if remote else None, lease_s=10.0))
        return attempt

    def land(
        self, attempt: AttemptId, num_tokens: int, pushes: int = 2, only: Sequence[int] | None = None
    ) -> None:
        handover = Handover(
            version=HANDOVER_VERSION,
            attempt=attempt,
            num_tokens=num_tokens,
            num_pushes=pushes,
            bytes_moved=0,
            first_token=7,
            logprobs=None,
        )
        for index in range(pushes) if only is None else only:
            given = handover if index == pushes - 1 else None
            note = encode(PushNote(attempt=attempt, sequence=index, handover=given))
            self.do(self.scheduler.handle(NoteArrived(peer=PREFILL, note=note), 1.0))

    def step(self, now: float = 1.0) -> list[tuple[str, int, int]]:
        """Compute the next step; what it was."""
        plan, actions = self.scheduler.schedule(now)
        self.do(actions)
        if plan is None:
            return []
        results = [WorkResult(Sampled(9, None) if turn.final else None, []) for turn in plan.turns]
        told = [(turn.run.attempt.request, turn.start, turn.end) for turn in plan.turns]
        self.do(self.scheduler.complete(plan, results, now))
        return told  # type: ignore[return-value]

    def last(self, kind: type[Message]) -> Message:
        return [message for message in self.sent if isinstance(message, kind)][-1]

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.sent)

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        """free, held, cached, quarantined"""
        counts = self.scheduler.heartbeat().blocks
        return counts.free, counts.held, counts.cached, counts.quarantined


def test_blocks_are_reserved_for_the_prompt_and_the_next_tokens() -> None:
    bench = Bench()
    attempt = bench.start("r", 9)
    reserved = bench.last(Reserved)
    assert isinstance(reserved, Reserved)
    assert (reserved.attempt, len(reserved.blocks), reserved.cached_tokens) == (attempt, 3, 0)
    assert bench.blocks == (28, 4, 0, 0)
    assert bench.step() == []


def test_kv_that_has_all_arrived_runs_and_streams_from_the_handed_over_token() -> None:
    bench = Bench()
    attempt = bench.start("r", 9, max_tokens=3)
    bench.land(attempt, 9)
    assert bench.count(KvArrived) == 1
    assert bench.last(Tokens) == Tokens(attempt=attempt, first_index=0, tokens=[7])
    assert bench.step() == [("r", 9, 10)]
    assert bench.last(Tokens) == Tokens(attempt=attempt, first_index=1, tokens=[9])
    bench.step()
    assert bench.last(Tokens) == Tokens(
        attempt=attempt, first_index=2, tokens=[9], finish_reason=FinishReason.LENGTH
    )
    assert bench.step() == []
    assert bench.blocks == (30, 0, 2, 0)


def test_notes_out_of_order_twice_or_of_nobody_are_counted_and_harmless() -> None:
    bench = Bench()
    attempt = bench.start("r", 9)
    bench.land(attempt, 9, pushes=3, only=[2, 0, 0, 2])
    assert bench.count(KvArrived) == 0
    bench.land(attempt.next(), 9)
    bench.do(bench.scheduler.handle(NoteArrived(peer=PREFILL, note=b"garbage"), 1.0))
    bench.land(attempt, 9, pushes=3, only=[1])
    assert bench.count(KvArrived) == 1
    notes = bench.scheduler.notes
    assert (notes.duplicate, notes.unknown, notes.malformed, notes.late) == (2, 2, 1, 0)


def test_a_wrong_hand_over_is_data_loss_and_its_blocks_wait_for_the_settlement() -> None:
    bench = Bench()
    attempt = bench.start("r", 9)
    bench.land(attempt, 8, pushes=3, only=[2])
    failed = bench.last(AttemptFailed)
    assert isinstance(failed, AttemptFailed)
    assert (failed.code, failed.retryable) == ("DATA_LOSS", True)
    assert bench.blocks == (29, 0, 0, 3)
    bench.tell(PushesSettled(attempt=attempt))
    assert bench.blocks == (32, 0, 0, 0)


def test_the_last_late_push_ends_the_quarantine_by_itself() -> None:
    bench = Bench()
    attempt = bench.start("r", 9)
    bench.land(attempt, 9, only=[0])
    bench.tell(Cancel(attempt=attempt, reason="test"))
    assert bench.blocks == (29, 0, 0, 3)
    bench.land(attempt, 9, only=[1])
    assert bench.blocks == (32, 0, 0, 0)
    assert bench.count(KvArrived) == 0
    assert bench.scheduler.notes.late == 1


def test_a_lease_that_runs_out_fails_the_attempt_and_a_renewal_prevents_it() -> None:
    bench = Bench()
    attempt = bench.start("r", 9)
    assert bench.scheduler.next_wake() == 10.0
    bench.tell(RenewLease(attempt=attempt, lease_s=10.0), now=8.0)
    bench.do(bench.scheduler.sweep(17.9))
    assert bench.count(AttemptFailed) == 0
    bench.do(bench.scheduler.sweep(18.0))
    failed = bench.last(AttemptFailed)
    assert isinstance(failed, AttemptFailed)
    assert (failed.code, failed.retryable) == ("DEADLINE_EXCEEDED", True)
    assert bench.blocks == (29, 0, 0, 3)
    assert bench.scheduler.next_wake() is None


def test_settled_pushes_end_a_reservation_that_nobody_will_fill() -> None:
    bench = Bench()
    attempt = bench.start("r", 9)
    bench.tell(PushesSettled(attempt=attempt))
    assert bench.blocks == (32, 0, 0, 0)
    assert bench.count(AttemptFailed) == 0


def test_a_dropped_peer_fails_its_attempts_and_frees_them_after_its_last_packets() -> None:
    bench = Bench()
    bench.start("r", 9)
    bench.tell(DropPeer(peer=PREFILL, epoch=1), now=5.0)
    assert bench.count(AttemptFailed) == 1
    assert bench.blocks == (29, 0, 0, 3)
    assert bench.scheduler.next_wake() == 5.0 + GONE_PEER_GRACE_S
    bench.do(bench.scheduler.sweep(5.0 + GONE_PEER_GRACE_S))
    assert bench.blocks == (32, 0, 0, 0)


def test_dropping_an_old_process_leaves_attempts_of_the_new_one_alone() -> None:
    bench = Bench()
    old = bench.start("old", 9)
    bench.meet(2)
    new = bench.start("new", 9)
    bench.tell(DropPeer(peer=PREFILL, epoch=1))
    failed = bench.last(AttemptFailed)
    assert isinstance(failed, AttemptFailed)
    assert failed.attempt == old
    bench.land(new, 9)
    assert bench.count(KvArrived) == 1


def test_a_peer_that_failed_keeps_its_blocks_in_quarantine_for_it_may_still_write() -> None:
    bench = Bench()
    bench.start("r", 9)
    bench.do(bench.scheduler.handle(PeerFailed(peer=PREFILL, error="reset"), 1.0))
    assert bench.count(AttemptFailed) == 1
    bench.do(bench.scheduler.sweep(1000.0))
    assert bench.blocks == (29, 0, 0, 3)
    bench.start("next", 9)
    refused = bench.last(Refused)
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.UNKNOWN_PEER


def test_a_prefill_worker_without_coordinator_frees_what_it_gave_up() -> None:
    bench = Bench()
    waiting, orphan = bench.start("waiting", 9), bench.start("orphan", 9)
    bench.tell(Cancel(attempt=orphan, reason="test"))
    for attempt in (waiting, orphan):
        note = encode(PushesSettled(attempt=attempt))
        bench.do(bench.scheduler.handle(NoteArrived(peer=PREFILL, note=note), 1.0))
    assert bench.blocks == (32, 0, 0, 0)
    failed = bench.last(AttemptFailed)
    assert isinstance(failed, AttemptFailed)
    assert (failed.attempt, failed.retryable) == (waiting, True)


def test_a_coordinator_ends_only_its_own_attempts() -> None:
    bench = Bench()
    attempt = bench.start("r", 9)
    stranger = OwnerId(2)
    bench.tell(Cancel(attempt=attempt, reason="test"), owner=stranger)
    bench.tell(PushesSettled(attempt=attempt), owner=stranger)
    bench.do(bench.scheduler.handle(CoordinatorLost(stranger), 0.0))
    assert bench.blocks == (28, 4, 0, 0)
    bench.do(bench.scheduler.handle(CoordinatorLost(OWNER), 0.0))
    assert bench.blocks == (29, 0, 0, 3)
    bench.tell(PushesSettled(attempt=attempt), owner=stranger)
    assert bench.blocks == (32, 0, 0, 0)


def test_a_sequence_that_needs_no_block_goes_on_while_another_waits_for_one() -> None:
    bench = Bench(num_blocks=6)
    first, second = bench.start("first", 6, max_tokens=60), bench.start("second", 6, max_tokens=60)
    bench.land(first, 6)
    bench.land(second, 6)
    told = [bench.step() for _ in range(15)]
    assert any(len(step) == 2 for step in told)
    assert all(any(name == "first" for name, _, _ in step) for step in told)
    assert bench.scheduler.heartbeat().preemptions > 0
    indices = [m.first_index for m in bench.sent if isinstance(m, Tokens) and m.attempt == first]
    assert indices == list(range(16))


def test_preemption_takes_the_least_urgent_and_it_is_computed_again_from_its_tokens() -> None:
    bench = Bench(num_blocks=6, budget=8)
    low, high = (
        bench.start("low", 6, priority=5, max_tokens=12),
        bench.start("high", 6, priority=1, max_tokens=12),
    )
    bench.land(low, 6)
    bench.land(high, 6)
    for _ in range(60):
        bench.step()
    assert bench.scheduler.heartbeat().preemptions > 0
    for attempt in (low, high):
        said = [m for m in bench.sent if isinstance(m, Tokens) and m.attempt == attempt]
        assert [m.first_index for m in said] == list(range(12))
        assert said[-1].finish_reason is FinishReason.LENGTH
    finished = [m.attempt for m in bench.sent if isinstance(m, Tokens) and m.finish_reason]
    assert finished == [high, low]
    assert bench.blocks[1] == bench.blocks[3] == 0


def test_nothing_new_is_taken_while_a_preempted_one_waits() -> None:
    bench = Bench(num_blocks=6)
    first, second = bench.start("first", 7, max_tokens=60), bench.start("second", 7, max_tokens=60)
    bench.land(first, 7)
    bench.land(second, 7)
    while not bench.scheduler.heartbeat().preemptions:
        bench.step()
    bench.start("third", 1)
    refused = bench.last(Refused)
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.NO_BLOCKS


def test_a_prompt_read_here_shares_the_budget_with_those_that_decode() -> None:
    bench = Bench(budget=10)
    decoding = bench.start("decoding", 5, max_tokens=20)
    bench.land(decoding, 5)
    bench.start("reading", 21, remote=False)
    told = [bench.step() for _ in range(4)]
    assert [step[0][0] for step in told] == ["decoding"] * 4
    assert [(start, end) for step in told for name, start, end in step if name == "reading"] == [
        (0, 8),
        (8, 16),
        (16, 21),
        (21, 22),
    ]


def test_prompts_read_here_share_a_step_only_until_it_reads_enough() -> None:
    bench = Bench(budget=100, gather=8)
    decoding = bench.start("decoding", 5, max_tokens=20)
    bench.land(decoding, 5)
    for name, tokens in (("a", 5), ("b", 5), ("c", 9)):
        bench.start(name, tokens, remote=False)
    read = [[name for name, start, _ in bench.step() if not start] for _ in range(3)]
    assert read == [["a", "b"], ["c"], []]


def test_reading_goes_on_even_when_decoding_takes_the_whole_budget() -> None:
    bench = Bench(budget=1, max_num_seqs=8)
    for index in range(3):
        bench.land(bench.start(f"d{index}", 5, max_tokens=20), 5)
    bench.start("reading", 9, remote=False)
    ends = [end for _ in range(3) for name, _, end in bench.step() if name == "reading"]
    assert ends == [4, 8, 9]


def test_two_prompts_with_the_same_beginning_share_its_blocks() -> None:
    bench = Bench()
    bench.land(bench.start("a", 9, seed=5), 9)
    bench.start("b", 11, seed=5)
    reserved = bench.last(Reserved)
    assert isinstance(reserved, Reserved)
    assert reserved.cached_tokens == 8
    bench.tell(Cancel(attempt=reserved.attempt, reason="test"))
    assert bench.blocks[3] == 1, "only what a push may write is quarantined"


@pytest.mark.parametrize(("num_tokens", "fits"), [(99, True), (100, False), (0, False)])
def test_what_can_never_fit_is_refused_as_too_long(num_tokens: int, fits: bool) -> None:
    bench = Bench()
    bench.start("r", num_tokens)
    assert bench.count(Reserved) == fits
    if not fits:
        refused = bench.last(Refused)
        assert isinstance(refused, Refused)
        assert refused.reason is RefusalReason.TOO_LONG


def test_refusals_name_their_reason() -> None:
    bench = Bench(num_blocks=8, max_num_seqs=2)
    bench.start("big", 28)
    bench.start("bigger", 28, seed=3)
    reasons = [m.reason for m in bench.sent if isinstance(m, Refused)]
    assert reasons == [RefusalReason.NO_BLOCKS]
    crowd = Bench(max_num_seqs=2)
    for index in range(4):
        crowd.start(f"r{index}", 2)
    assert [m.reason for m in crowd.sent if isinstance(m, Refused)] == [RefusalReason.BATCH_FULL]
    crowd.tell(Drain())
    crowd.start("late", 2)
    refused = crowd.last(Refused)
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.DRAINING


def test_a_batch_never_has_more_than_its_seats() -> None:
    bench = Bench(max_num_seqs=4)
    for index in range(5):
        bench.land(bench.start(f"r{index}", 3, max_tokens=4), 3)
    assert max(len(bench.step()) for _ in range(10)) == 4
    assert bench.scheduler.heartbeat().running == 0


def test_a_row_without_a_valid_token_fails_its_own_request_alone() -> None:
    bench = Bench()
    bad, good = bench.start("bad", 5), bench.start("good", 5)
    bench.land(bad, 5)
    bench.land(good, 5)
    plan, _ = bench.scheduler.schedule(1.0)
    assert plan is not None
    results = [
        WorkResult(SampleFailed(Overloaded("no token")) if t.run.attempt == bad else Sampled(9, None), [])
        for t in plan.turns
    ]
    bench.do(bench.scheduler.complete(plan, results, 1.0))
    failed = bench.last(AttemptFailed)
    assert isinstance(failed, AttemptFailed)
    assert failed.attempt == bad
    assert [name for name, _, _ in bench.step()] == ["good"]


def test_the_ids_of_reserved_blocks_are_those_the_prefill_worker_writes() -> None:
    bench = Bench()
    bench.start("r", 12)
    reserved = bench.last(Reserved)
    assert isinstance(reserved, Reserved)
    assert len(set(reserved.blocks)) == 3
    assert all(isinstance(block, int) and BlockId(block) in range(32) for block in reserved.blocks)


def test_a_request_that_is_preempted_by_its_coordinator_gives_its_blocks_back_and_says_so_last() -> None:
    bench = Bench()
    attempt, other = bench.start("r", 9), bench.start("s", 5)
    bench.land(attempt, 9)
    bench.step()
    streamed = bench.count(Tokens)
    bench.tell(Preempt(attempt=attempt))
    assert bench.last(Preempted) == Preempted(attempt=attempt)
    assert bench.sent[-1] == Preempted(attempt=attempt)
    assert bench.count(Tokens) == streamed == 2
    assert bench.step() == []
    assert bench.scheduler.heartbeat().preemptions == 1
    # The tokens so far come back as a new attempt, whose full blocks are still here.
    assert bench.blocks[2] == 2
    bench.tell(Cancel(attempt=other, reason="test"))
    bench.tell(PushesSettled(attempt=other))
    assert bench.blocks[1] == bench.blocks[3] == 0


def test_preemption_leaves_alone_what_does_not_run_here_or_waits_for_pushes() -> None:
    bench = Bench()
    waiting, running = bench.start("w", 9), bench.start("r", 9)
    bench.land(running, 9)
    bench.tell(Preempt(attempt=waiting))
    bench.tell(Preempt(attempt=AttemptId(RequestId("nobody"), 0)))
    bench.tell(Preempt(attempt=running), owner=OwnerId(2))
    assert bench.count(Preempted) == 0
    assert bench.step() == [("r", 9, 10)]


def test_the_least_urgent_gives_way_first_by_priority_and_then_by_arrival() -> None:
    bench = Bench(num_blocks=12, max_num_seqs=4)
    for name, priority, arrival in (("batch", 10, 0.0), ("old", 0, 1.0), ("young", 0, 2.0)):
        bench.land(bench.start(name, 7, max_tokens=20, priority=priority, arrival=arrival), 7)
    order: list[str] = []
    for _ in range(18):
        running = {name for name, *_ in bench.step()}
        order += [name for name in ("batch", "old", "young") if name not in running and name not in order]
    assert order[0] == "batch"
    assert "old" not in order[:2]
