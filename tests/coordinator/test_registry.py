"""One request, one event at a time: what the registry says to whom, and when."""

from __future__ import annotations

import pytest

from coordinator.events import Emit, FromWorker
from pdserve.core.errors import DeadlineExceeded
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    ConnectPeer,
    FinishReason,
    KvArrived,
    PrefillDone,
    PushesSettled,
    RefusalReason,
    Refused,
    RenewLease,
    Role,
    StartDecode,
    StartPrefill,
    Tokens,
    TransferDone,
)
from pdserve.core.sampling import SamplingParams
from tests.support.model_workers import continuation
from tests.support.registry_steps import hear, pair, sent, up_to_prefill
from tests.support.registry_world import SETTINGS, World, new_request

P, D = WorkerId("prefill-0"), WorkerId("decode-0")


@pytest.fixture
def world() -> World:
    return pair()


def test_workers_of_a_model_are_introduced_to_each_other() -> None:
    world = World()
    world.join("prefill-0", Role.PREFILL)
    world.join("prefill-1", Role.PREFILL)
    assert world.sent == []
    world.join("decode-0", Role.DECODE)
    met = {(s.worker, s.message.peer) for s in sent(world, ConnectPeer)}  # type: ignore[union-attr]
    assert met == {(P, D), (D, P), (WorkerId("prefill-1"), D), (D, WorkerId("prefill-1"))}


def test_a_request_reserves_at_decode_before_its_prompt_is_read(world: World) -> None:
    world.submit(new_request())
    assert [(s.worker, type(s.message)) for s in world.sent] == [(D, StartDecode)]
    world.deliver_down(D)
    world.deliver_up(D)
    assert [(s.worker, type(s.message)) for s in world.sent[1:]] == [(P, StartPrefill)]
    start = world.sent[1].message
    assert isinstance(start, StartPrefill)
    assert (start.decode_worker, start.decode_epoch, len(start.dst_blocks)) == (D, 1, 1)


def test_an_answer_comes_whole_and_leaves_nothing_behind(world: World) -> None:
    world.submit(new_request(max_tokens=7))
    world.run()
    assert world.outcome("r") == "length"
    assert world.output[RequestId("r")] == continuation([1, 2, 3], 7)
    report = world.ends[RequestId("r")].report
    assert (report.prefill_worker, report.decode_worker, report.attempts) == (P, D, 1)
    assert (report.bytes_moved, report.transfer_path, report.transfer_exposed_s) == (4096, "fake", 0.015625)
    assert (report.prefill_s, report.prompt_tokens, report.output_tokens) == (0.5, 3, 7)
    world.assert_at_rest()


def test_the_first_token_is_streamed_before_the_kv_has_arrived(world: World) -> None:
    attempt = up_to_prefill(world)
    done = PrefillDone(
        attempt=attempt, token=99, logprobs=None, prompt_logprobs=[], finish_reason=None, compute_s=1.0
    )
    actions = world.registry.handle(FromWorker(worker=P, epoch=1, message=done), 5.0)
    assert actions == [Emit(request=RequestId("r"), tokens=[99], logprobs=[], gap_s=None)]
    again = world.registry.handle(
        FromWorker(worker=D, epoch=1, message=Tokens(attempt=attempt, first_index=0, tokens=[99, 5])), 6.0
    )
    assert again == [Emit(request=RequestId("r"), tokens=[5], logprobs=[], gap_s=1.0)]


def test_a_first_token_that_ends_the_answer_gives_the_reserved_blocks_back(world: World) -> None:
    world.submit(new_request(max_tokens=1))
    world.run()
    assert world.outcome("r") == "length"
    assert [s.worker for s in sent(world, Cancel)] == [D]
    assert [s.worker for s in sent(world, PushesSettled)] == [D]
    world.assert_at_rest()


def test_a_cancel_before_the_reservation_settles_it_at_once(world: World) -> None:
    world.submit(new_request())
    world.cancel("r")
    assert [type(s.message) for s in world.sent] == [StartDecode, Cancel, PushesSettled]
    world.run()
    assert world.outcome("r") == "RequestCancelled"
    world.assert_at_rest()


def test_a_cancel_during_prefill_reaches_both_and_the_settling_is_relayed(world: World) -> None:
    attempt = up_to_prefill(world)
    world.sent.clear()
    world.cancel("r")
    assert {s.worker for s in sent(world, Cancel)} == {P, D}
    assert sent(world, PushesSettled) == []
    hear(world, P, PushesSettled(attempt=attempt))
    assert [s.worker for s in sent(world, PushesSettled)] == [D]
    hear(world, P, PushesSettled(attempt=attempt))
    assert len(sent(world, PushesSettled)) == 1


def test_a_cancel_that_crosses_a_complete_transfer_is_settled_by_its_completion(world: World) -> None:
    attempt = up_to_prefill(world)
    world.cancel("r")
    world.sent.clear()
    hear(world, P, TransferDone(attempt=attempt, bytes_moved=1, exposed_s=0.0, busy_s=1.0, path="shm"))
    assert [s.worker for s in sent(world, PushesSettled)] == [D]


def test_messages_of_an_older_attempt_mean_nothing(world: World) -> None:
    attempt = up_to_prefill(world)
    failed = AttemptFailed(attempt=attempt, code="UNAVAILABLE", message="link", retryable=True)
    hear(world, P, failed)
    for late in (
        Tokens(attempt=attempt, first_index=0, tokens=[1]),
        KvArrived(attempt=attempt),
        failed,
        Refused(attempt=attempt, reason=RefusalReason.NO_BLOCKS, detail=""),
    ):
        hear(world, D, late)
    assert world.output[RequestId("r")] == []
    world.run()
    assert world.ends[RequestId("r")].report.attempts == 2
    world.assert_at_rest()


def test_messages_of_a_worker_that_has_nothing_to_do_with_the_request_mean_nothing(world: World) -> None:
    attempt = up_to_prefill(world)
    world.join("decode-1", Role.DECODE)
    hear(world, WorkerId("decode-1"), Tokens(attempt=attempt, first_index=0, tokens=[1]))
    hear(world, P, Tokens(attempt=attempt, first_index=0, tokens=[1]))
    assert world.output[attempt.request] == []


def test_without_prefill_workers_decode_reads_the_prompt_itself() -> None:
    world = World()
    world.join("decode-0", Role.DECODE)
    world.submit(new_request())
    start = world.sent[-1].message
    assert isinstance(start, StartDecode)
    assert start.prefill_worker is None
    world.run()
    assert world.output[RequestId("r")] == continuation([1, 2, 3], 4)
    assert world.ends[RequestId("r")].report.prefill_worker == ""


def test_a_deadline_ends_the_request_wherever_it_is(world: World) -> None:
    world.submit(new_request(deadline=2.0))
    world.flush()
    assert world.registry.next_tick(1.9) == pytest.approx(2.0)
    world.tick(2.0)
    assert isinstance(world.ends[RequestId("r")].outcome, DeadlineExceeded)
    world.run()
    world.assert_at_rest()


def test_leases_are_renewed_while_the_prompt_waits_its_turn(world: World) -> None:
    up_to_prefill(world)
    world.tick(0.5)
    assert sent(world, RenewLease) == []
    world.tick(0.6)
    assert [s.worker for s in sent(world, RenewLease)] == [D]
    world.tick(0.1)
    assert len(sent(world, RenewLease)) == 1


def test_the_end_waits_a_moment_for_the_figures_of_the_transfer(world: World) -> None:
    attempt = up_to_prefill(world)
    tokens = continuation([1, 2, 3], 4)
    hear(world, D, Tokens(attempt=attempt, first_index=0, tokens=tokens, finish_reason=FinishReason.LENGTH))
    assert world.output[RequestId("r")] == tokens
    assert not world.ends
    hear(world, P, TransferDone(attempt=attempt, bytes_moved=9, exposed_s=0.0, busy_s=1.0, path="shm"))
    assert world.ends[RequestId("r")].report.bytes_moved == 9


def test_the_end_does_not_wait_for_figures_that_do_not_come(world: World) -> None:
    attempt = up_to_prefill(world)
    tokens = continuation([1, 2, 3], 4)
    hear(world, D, Tokens(attempt=attempt, first_index=0, tokens=tokens, finish_reason=FinishReason.LENGTH))
    assert world.registry.next_tick(world.now) == pytest.approx(SETTINGS.settle_wait_s)
    world.tick(SETTINGS.settle_wait_s)
    assert world.outcome("r") == "length"


def test_other_samples_follow_the_first_once_its_kv_can_be_shared(world: World) -> None:
    world.join("decode-1", Role.DECODE)
    world.join("prefill-1", Role.PREFILL)
    prompt = list(range(1, 21))
    world.sent.clear()
    world.submit(*(new_request(f"r.{index}", prompt=prompt) for index in range(3)))
    assert len(sent(world, StartDecode)) == 1
    world.run()
    assert len({end.report.decode_worker for end in world.ends.values()}) == 1
    assert len({end.report.prefill_worker for end in world.ends.values()} - {""}) == 1
    assert len(world.ends) == 3
    world.assert_at_rest()


def test_prompt_logprobs_come_once_even_over_two_attempts(world: World) -> None:
    world.submit(new_request(sampling=SamplingParams(max_tokens=4, seed=1, prompt_logprobs=1)))
    world.flush()
    for _ in range(5):
        world.step(P)
        while world.pushes:
            world.land(0)
        world.flush()
    world.join("decode-0", Role.DECODE, epoch=2)
    spec = sent(world, StartDecode)[-1].message.spec  # type: ignore[union-attr]
    assert spec.sampling.prompt_logprobs is None
    world.run()
    assert world.prompt_logprobs == {RequestId("r"): 1}


def test_a_stop_string_found_while_waiting_for_another_attempt_finishes_the_request(world: World) -> None:
    world.submit(new_request(max_tokens=6))
    world.flush()
    for _ in range(5):
        world.step(P)
        while world.pushes:
            world.land(0)
        world.flush()
    world.end_process("decode-0")
    assert world.registry.num_waiting == 1
    world.stop_matched("r")
    assert world.outcome("r") == "stop"
    world.run()
    world.assert_at_rest()
