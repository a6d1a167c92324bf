"""The prefill scheduler alone: no engine, no threads, a clock that is an argument."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.protocol import Outcome, Path, PathInfo, PeerConnected, PeerFailed, Push, PushEnded
from pdserve.core.codec import decode
from pdserve.core.handover import PushNote
from pdserve.core.ids import AttemptId, BlockId, RequestId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout, blocks_for
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    ConnectPeer,
    DropPeer,
    Message,
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    RequestSpec,
    Role,
    StartPrefill,
    TransferDone,
)
from pdserve.core.sampling import SamplingParams
from pdserve.elastic.plan import StepPlan
from pdserve.engine.batch import Sampled
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import (
    Action,
    CoordinatorLost,
    DisconnectTransfer,
    FromCoordinator,
    OwnerId,
    Send,
    SubmitPush,
)
from tests.support.schedulers import make_scheduler

BLOCK, LAYERS = 4, 6
LAYOUT = GroupLayout(
    group=CacheGroup(name="kv", num_layers=LAYERS, num_kv_heads=1, head_dim=2, dtype="float32"),
    block_tokens=BLOCK,
)
DECODE, OWNER = WorkerId("decode-0"), OwnerId(1)


class Bench:
    """A scheduler, and what was asked of the world."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        budget: int = 16,
        max_num_seqs: int = 8,
        prefix_caching: bool = True,
        gather: int | None = None,
    ) -> None:
        self.scheduler = make_scheduler(
            Role.PREFILL,
            layout=LAYOUT,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            budget=budget,
            prefix_caching=prefix_caching,
            gather=gather,
        )
        self.sent: list[Message] = []
        self.pushes: list[Push] = []
        self.others: list[Action] = []
        fingerprint = Fingerprint(protocol=PROTOCOL_VERSION, model="m", layouts=(LAYOUT,))
        self.tell(ConnectPeer(peer=DECODE, epoch=1, fingerprint=fingerprint, metadata=b""))
        path = PathInfo(path=Path.SHM)
        self.do(self.scheduler.handle(PeerConnected(peer=DECODE, epoch=1, path=path), 0.0))

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(_, message):
                    self.sent.append(message)
                case SubmitPush(push):
                    self.pushes.append(push)
                case _:
                    self.others.append(action)
        self.scheduler.audit()

    def tell(self, message: Message, now: float = 0.0, owner: OwnerId = OWNER) -> None:
        self.do(self.scheduler.handle(FromCoordinator(owner, message), now))

    def start(self, name: str, tokens: Sequence[int], **fields: object) -> AttemptId:
        attempt = AttemptId(RequestId(name), 0)
        spec_fields: dict[str, object] = {
            "sampling": SamplingParams(temperature=0.0, max_tokens=8),
            "arrival": 0.0,
            **{k: v for k, v in fields.items() if k not in ("cached", "epoch")},
        }
        spec = RequestSpec(
            attempt=attempt,
            tokens=list(tokens),
            num_prompt_tokens=len(tokens),
            eos_token_ids=(),
            cache_salt=b"",
            **spec_fields,  # type: ignore[arg-type]
        )
        self.tell(
            StartPrefill(
                spec=spec,
                decode_worker=DECODE,
                decode_epoch=int(fields.get("epoch", 1)),  # type: ignore[call-overload]
                dst_blocks=[BlockId(100 + i) for i in range(blocks_for(len(tokens), BLOCK))],
                dst_cached_tokens=int(fields.get("cached", 0)),  # type: ignore[call-overload]
                transfer_deadline_s=5.0,
            )
        )
        return attempt

    def plan(self, now: float = 0.0) -> list[tuple[str, int, int]]:
        """What the next step reads: request, from, to."""
        self.current, actions = self.scheduler.schedule(now)
        self.do(actions)
        chunks = self.current.chunks if self.current else []
        return [(chunk.run.attempt.request, chunk.start, chunk.end) for chunk in chunks]

    def compute(self, *, groups: int = 2, token: int = 7, now: float = 1.0) -> None:
        plan = self.current
        assert isinstance(plan, StepPlan)
        for group in range(groups):
            edges = LAYERS * group // groups, LAYERS * (group + 1) // groups
            self.do(self.scheduler.layers_done(plan, *edges, now))
        results = [WorkResult(Sampled(token, None) if c.final else None, []) for c in plan.chunks]
        self.do(self.scheduler.complete(plan, results, now))

    def end_pushes(self, outcome: Outcome = Outcome.COMPLETED, now: float = 2.0) -> None:
        pushes, self.pushes = self.pushes, []
        for push in pushes:
            moved = len(push.src_blocks) * (push.layers[1] - push.layers[0]) * LAYOUT.layer_bytes
            self.do(
                self.scheduler.handle(
                    PushEnded(id=push.id, outcome=outcome, bytes_moved=moved, seconds=0.125), now
                )
            )

    def said(self, kind: type) -> list[Message]:
        return [message for message in self.sent if isinstance(message, kind)]


def test_prompts_are_read_by_deadline_then_priority_then_arrival() -> None:
    bench = Bench(budget=100)
    bench.start("late", range(4), ttft_deadline=9.0)
    bench.start("patient", range(4), arrival=1.0)
    bench.start("older", range(4), arrival=0.5)
    bench.start("urgent", range(4), priority=-1, arrival=2.0)
    bench.start("soon", range(4), ttft_deadline=3.0)
    assert [name for name, _, _ in bench.plan()] == ["soon", "late", "urgent", "older", "patient"]


def test_a_long_prompt_is_read_in_chunks_that_end_on_blocks() -> None:
    bench = Bench(budget=10)
    bench.start("r", range(21))
    seen = []
    while plan := bench.plan():
        seen += plan
        bench.compute()
    assert seen == [("r", 0, 8), ("r", 8, 16), ("r", 16, 21)]
    assert [m.tokens_done for m in bench.said(PrefillProgress)] == [8, 16]  # type: ignore[attr-defined]


def test_short_prompts_fill_the_budget_that_a_chunk_leaves() -> None:
    bench = Bench(budget=16)
    bench.start("a", range(6))
    bench.start("b", range(20, 27))
    bench.start("c", range(40, 49))
    assert bench.plan() == [("a", 0, 6), ("b", 0, 7)]
    bench.compute()
    assert bench.plan() == [("c", 0, 9)]  # its first block was just read for another


def test_prompts_share_a_step_only_until_it_reads_enough() -> None:
    bench = Bench(budget=100, gather=8)
    for name, tokens in (("a", range(5)), ("b", range(20, 25)), ("c", range(40, 49)), ("d", range(60, 62))):
        bench.start(name, tokens)
    steps = []
    while plan := bench.plan():
        steps.append([name for name, _, _ in plan])
        bench.compute()
    assert steps == [["a", "b"], ["c"], ["d"]]


def test_a_more_urgent_prompt_goes_ahead_of_one_that_is_half_read() -> None:
    bench = Bench(budget=8)
    bench.start("long", range(24))
    bench.plan()
    bench.compute()
    bench.start("urgent", range(50, 56), ttft_deadline=1.0)
    assert bench.plan() == [("urgent", 0, 6)]
    bench.compute()
    assert bench.plan() == [("long", 8, 16)]


def test_a_budget_below_a_block_still_advances() -> None:
    bench = Bench(budget=1)
    bench.start("r", range(6))
    assert bench.plan() == [("r", 0, 4)]


def test_a_prompt_without_room_waits_and_nobody_overtakes_it() -> None:
    bench = Bench(num_blocks=8, budget=100)
    bench.start("a", range(20))
    bench.start("b", range(50, 70))
    bench.start("c", range(80, 82))
    assert bench.plan() == [("a", 0, 20)]
    bench.compute()
    assert bench.plan() == []
    bench.end_pushes()
    assert [name for name, _, _ in bench.plan()] == ["b", "c"]


def test_layers_of_a_chunk_are_pushed_as_they_are_done_and_the_hand_over_comes_last() -> None:
    bench = Bench(budget=8)
    attempt = bench.start("r", range(13))
    bench.plan()
    bench.compute(groups=3)
    assert [(p.layers, len(p.src_blocks)) for p in bench.pushes] == [((0, 2), 2), ((2, 4), 2), ((4, 6), 2)]
    bench.plan()
    bench.compute(groups=3, token=42)
    assert [p.layers for p in bench.pushes[3:]] == [(0, 2), (2, 4), (4, 6)]
    notes = [decode(push.note) for push in bench.pushes]
    assert [note.sequence for note in notes if isinstance(note, PushNote)] == list(range(6))
    handover = notes[-1].handover  # type: ignore[union-attr]
    assert [note.handover for note in notes[:-1]] == [None] * 5  # type: ignore[union-attr]
    assert (handover.attempt, handover.num_tokens, handover.num_pushes) == (attempt, 13, 6)
    assert handover.first_token == 42
    assert handover.bytes_moved == 4 * LAYOUT.block_bytes
    assert [b for p in bench.pushes for b in p.dst_blocks if p.layers == (0, 2)] == [100, 101, 102, 103]


def test_one_layer_group_still_hands_over() -> None:
    bench = Bench()
    bench.start("r", range(3))
    bench.plan()
    bench.compute(groups=1)
    (push,) = bench.pushes
    assert push.layers == (0, LAYERS)
    assert decode(push.note).handover is not None  # type: ignore[union-attr]


def test_the_last_word_is_transfer_done_with_what_was_measured() -> None:
    bench = Bench()
    attempt = bench.start("r", range(8))
    bench.plan(now=0.5)
    bench.compute(now=1.5)
    assert bench.said(TransferDone) == []
    bench.end_pushes(now=1.75)
    (done,) = bench.said(TransferDone)
    assert done == TransferDone(
        attempt=attempt, bytes_moved=2 * LAYOUT.block_bytes, exposed_s=0.25, busy_s=0.25, path="shm"
    )
    assert bench.sent[-1] is done
    counts = bench.scheduler.heartbeat().blocks
    assert (counts.held, counts.cached) == (0, 2)


def test_a_failed_push_is_told_once_and_settled_once() -> None:
    bench = Bench(budget=4)
    attempt = bench.start("r", range(12))
    bench.plan()
    bench.compute()
    bench.end_pushes(Outcome.FAILED)
    assert len(bench.said(AttemptFailed)) == 1
    assert bench.sent[-1] == PushesSettled(attempt=attempt)
    assert bench.plan() == []
    assert bench.scheduler.heartbeat().blocks.held == 0


def test_a_push_past_its_deadline_settles_only_when_it_is_terminal() -> None:
    bench = Bench()
    bench.start("r", range(8))
    bench.plan()
    bench.compute()
    (first, last), bench.pushes = bench.pushes, []
    bench.do(bench.scheduler.handle(PushEnded(id=first.id, outcome=Outcome.TIMED_OUT), 6.0))
    assert len(bench.said(AttemptFailed)) == 1
    bench.do(bench.scheduler.handle(PushEnded(id=last.id, outcome=Outcome.COMPLETED), 6.1))
    assert bench.said(PushesSettled) == []
    assert bench.scheduler.heartbeat().blocks.quarantined == 2
    bench.do(bench.scheduler.handle(PushEnded(id=first.id, outcome=Outcome.COMPLETED), 7.0))
    assert len(bench.said(PushesSettled)) == 1
    assert bench.said(TransferDone) == []


def test_cancelling_waits_for_the_pushes_under_way() -> None:
    bench = Bench(budget=8)
    attempt = bench.start("r", range(20))
    bench.plan()
    bench.compute()
    bench.tell(Cancel(attempt=attempt, reason="gone"))
    assert bench.said(PushesSettled) == []
    bench.end_pushes()
    assert bench.sent[-1] == PushesSettled(attempt=attempt)
    assert bench.said(AttemptFailed) == []


def test_cancelling_one_that_waits_or_was_never_seen_is_answered_at_once() -> None:
    bench = Bench()
    attempt = bench.start("r", range(20))
    bench.tell(Cancel(attempt=attempt, reason="gone"))
    bench.tell(Cancel(attempt=attempt, reason="gone"))
    assert bench.sent == [PushesSettled(attempt=attempt)] * 2


def test_a_peer_that_fails_ends_its_attempts_as_retryable() -> None:
    bench = Bench(budget=8)
    bench.start("r", range(20))
    bench.plan()
    bench.compute()
    bench.do(bench.scheduler.handle(PeerFailed(peer=DECODE, error="reset"), 2.0))
    (failed,) = bench.said(AttemptFailed)
    assert failed.retryable  # type: ignore[attr-defined]
    bench.end_pushes(Outcome.FAILED)
    assert len(bench.said(PushesSettled)) == 1
    bench.start("next", range(4))
    assert "not connected" in bench.said(AttemptFailed)[-1].message  # type: ignore[attr-defined]


def test_dropping_an_old_process_of_a_peer_leaves_the_new_one_alone() -> None:
    bench = Bench()
    fingerprint = Fingerprint(protocol=PROTOCOL_VERSION, model="m", layouts=(LAYOUT,))
    bench.tell(ConnectPeer(peer=DECODE, epoch=2, fingerprint=fingerprint, metadata=b""))
    bench.start("r", range(4), epoch=2)
    bench.tell(DropPeer(peer=DECODE, epoch=1))
    assert bench.others[-1] == DisconnectTransfer(DECODE, 1)
    assert bench.plan() == [("r", 0, 4)]


def test_a_first_token_that_ends_the_answer_pushes_nothing_more() -> None:
    bench = Bench()
    attempt = bench.start("r", range(8), sampling=SamplingParams(temperature=0.0, max_tokens=1))
    bench.plan()
    bench.compute(groups=2)
    assert [p.layers for p in bench.pushes] == [(0, 3)]
    (done,) = bench.said(PrefillDone)
    assert done.finish_reason is not None  # type: ignore[attr-defined]
    bench.end_pushes()
    assert bench.sent[-1] == PushesSettled(attempt=attempt)


def test_without_its_coordinator_it_tells_the_decode_worker_by_push_that_nothing_is_to_come() -> None:
    bench = Bench(budget=8)
    begun = bench.start("begun", range(20))
    bench.start("waits", range(50, 90))
    bench.plan()
    bench.compute()
    bench.do(bench.scheduler.handle(CoordinatorLost(OWNER), 2.0))
    notes = [decode(push.note) for push in bench.pushes]
    assert notes[-1] == PushesSettled(attempt=AttemptId(RequestId("waits"), 0))
    assert all(isinstance(note, PushNote) for note in notes[:-1])
    bench.end_pushes()
    (last,) = bench.pushes
    assert decode(last.note) == PushesSettled(attempt=begun)
    assert last.dst_blocks == (BlockId(104),)
    bench.end_pushes()
    assert bench.scheduler.heartbeat().blocks.held == 0


def test_without_its_coordinator_a_hand_over_under_way_is_left_to_arrive() -> None:
    bench = Bench()
    bench.start("r", range(8))
    bench.plan()
    bench.compute()
    bench.do(bench.scheduler.handle(CoordinatorLost(OWNER), 2.0))
    bench.end_pushes(Outcome.FAILED)
    assert bench.pushes == [], "the decode worker may be running it: nothing is written"
    assert bench.scheduler.heartbeat().blocks.held == 0


def test_a_cached_prefix_is_pushed_at_once_and_only_the_rest_is_read() -> None:
    bench = Bench(budget=100)
    bench.start("a", range(12))
    bench.plan()
    bench.compute()
    bench.end_pushes()
    bench.start("b", [*range(8), 90, 91], cached=4)
    assert bench.plan() == [("b", 8, 10)]
    (push,) = bench.pushes
    assert (push.layers, push.dst_blocks) == ((0, LAYERS), (BlockId(101),))
    started = bench.said(PrefillStarted)[-1]
    assert started.cached_tokens == 8  # type: ignore[attr-defined]


def test_prompt_logprobs_read_every_position_in_spite_of_the_cache() -> None:
    bench = Bench(budget=100)
    bench.start("a", range(12))
    bench.plan()
    bench.compute()
    bench.start("b", range(12), sampling=SamplingParams(temperature=0.0, prompt_logprobs=1))
    assert bench.plan() == [("b", 0, 12)]


def test_a_step_that_fails_takes_only_its_own_requests_along() -> None:
    bench = Bench(budget=8)
    attempt = bench.start("a", range(8))
    bench.start("b", range(20, 28))
    bench.plan()
    bench.do(bench.scheduler.fail_step(RuntimeError("boom"), 1.0))
    (failed,) = bench.said(AttemptFailed)
    assert failed.attempt == attempt  # type: ignore[attr-defined]
    assert bench.plan() == [("b", 0, 8)]


def test_a_start_that_does_not_fit_its_blocks_is_refused() -> None:
    bench = Bench()
    for fields, named in (({"cached": 3}, "dst_cached_tokens"), ({"cached": 8}, "dst_cached_tokens")):
        bench.start("r", range(8), **fields)
        assert named in bench.said(AttemptFailed)[-1].message  # type: ignore[attr-defined]
    bench.start("long", range(101))
    assert not bench.said(AttemptFailed)[-1].retryable  # type: ignore[attr-defined]
    assert len(bench.said(PushesSettled)) == 3


def test_a_prompt_waits_for_the_blocks_that_one_before_it_is_computing_and_others_do_not() -> None:
    bench = Bench(budget=12)
    bench.start("first", range(20), arrival=0.0)
    bench.start("alike", [*range(16), 90, 91, 92], arrival=1.0)
    bench.start("other", range(50, 54), arrival=2.0)
    assert bench.plan() == [("first", 0, 12)]
    bench.compute()
    assert bench.plan() == [("first", 12, 20), ("other", 0, 4)]
    bench.compute()
    assert bench.plan() == [("alike", 16, 19)]
    started = bench.sent[-1]
    assert isinstance(started, PrefillStarted)
    assert started.cached_tokens == 16


def test_a_prompt_whose_forerunner_is_cancelled_computes_what_it_waited_for() -> None:
    bench = Bench(budget=8)
    first = bench.start("first", range(20), arrival=0.0)
    bench.start("alike", range(18), arrival=1.0)
    assert bench.plan() == [("first", 0, 8)]
    bench.compute()
    bench.tell(Cancel(attempt=first, reason="test"))
    assert bench.plan() == [("alike", 8, 16)]


def test_a_more_urgent_prompt_does_not_wait_for_a_less_urgent_one() -> None:
    bench = Bench(budget=8)
    bench.start("slow", range(30))
    assert bench.plan() == [("slow", 0, 8)]
    bench.compute()
    bench.start("urgent", range(28), ttft_deadline=1.0)
    assert bench.plan() == [("urgent", 8, 16)]


def test_without_a_prefix_cache_nothing_is_waited_for() -> None:
    bench = Bench(budget=16, prefix_caching=False)
    bench.start("a", range(8))
    bench.start("b", range(8))
    assert bench.plan() == [("a", 0, 8), ("b", 0, 8)]
