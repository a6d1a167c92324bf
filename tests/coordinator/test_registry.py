"""One request, one event at a time: what the registry says to whom, and when."""

from __future__ import annotations

import pytest

from coordinator.book import RegistrySettings
from coordinator.events import Emit, FromWorker, Send
from pdserve.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, TransferError
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    ConnectPeer,
    DropPeer,
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
    Up,
)
from pdserve.core.sampling import SamplingParams
from tests.support.model_workers import ModelDecode, continuation
from tests.support.registry_world import SETTINGS, World, new_request

P, D = WorkerId("prefill-0"), WorkerId("decode-0")


@pytest.fixture
def world() -> World:
    world = World()
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE)
    world.flush()
    world.sent.clear()
    return world


def sent(world: World, kind: type) -> list[Send]:
    return [action for action in world.sent if isinstance(action.message, kind)]


def hear(world: World, worker: WorkerId, message: Up, *, epoch: int = 1) -> None:
    world.handle(FromWorker(worker=worker, epoch=epoch, message=message))


def up_to_prefill(world: World, name: str = "r") -> AttemptId:
    """Submitted, reserved, and sent to the prefill worker, which has not read it yet."""
    world.submit(new_request(name))
    world.deliver_down(D)
    world.deliver_up(D)
    return AttemptId(RequestId(name), 0)


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


def test_a_refusal_sends_the_request_to_another_decode_worker(world: World) -> None:
    world.join("decode-1", Role.DECODE)
    for name in ("decode-0", "decode-1"):
        worker = world.workers[WorkerId(name)]
        assert isinstance(worker, ModelDecode)
        worker.refuse_next = 1 if name == "decode-0" else 0
    for index in range(4):
        world.submit(new_request(f"r{index}"))
    world.run()
    assert {world.outcome(f"r{index}") for index in range(4)} == {"length"}
    assert all(end.report.attempts == 1 for end in world.ends.values())


def test_a_request_that_everyone_refused_waits_until_room_may_have_appeared(world: World) -> None:
    worker = world.workers[D]
    assert isinstance(worker, ModelDecode)
    worker.refuse_next = 1
    world.submit(new_request())
    world.run()
    assert world.registry.num_waiting == 1
    offers = len(sent(world, StartDecode))
    world.tick(1.0)
    assert len(sent(world, StartDecode)) == offers
    world.beat(D)
    world.run()
    assert world.outcome("r") == "length"


def test_after_a_refusal_one_request_at_a_time_finds_out_whether_there_is_room(world: World) -> None:
    worker = world.workers[D]
    assert isinstance(worker, ModelDecode)
    worker.refuse_next = 1
    world.submit(new_request("first"))
    world.flush()
    for index in range(5):
        world.submit(new_request(f"r{index}"))
    world.sent.clear()
    world.beat(D)
    world.deliver_up(D)
    assert len(sent(world, StartDecode)) == 1
    world.run()
    assert set(map(world.outcome, world.requests)) == {"length"}


def test_the_most_urgent_request_goes_first_and_equals_in_order_of_arrival() -> None:
    world = World()
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -1)):
        world.submit(new_request(name, priority=priority))
    world.join("decode-0", Role.DECODE)
    order = [s.message.spec.attempt.request for s in sent(world, StartDecode)]  # type: ignore[union-attr]
    assert order == ["urgent", "first", "second", "late"]


def test_a_prompt_no_worker_will_ever_have_room_for_is_refused_at_once() -> None:
    world = World()
    world.join("decode-0", Role.DECODE, num_blocks=2)
    world.submit(new_request(prompt=[1] * 8))
    assert world.outcome("r") == "BlockPoolExhausted"


def test_a_request_that_waited_for_workers_which_are_too_small_is_refused_when_they_come() -> None:
    world = World()
    world.submit(new_request(prompt=[1] * 8))
    world.join("decode-0", Role.DECODE, num_blocks=2)
    world.run()
    assert world.outcome("r") == "BlockPoolExhausted"


def test_a_request_an_idle_worker_has_no_room_for_is_refused_rather_than_kept_waiting(world: World) -> None:
    worker = world.workers[D]
    assert isinstance(worker, ModelDecode)
    worker.refuse_next = 2
    world.beat(D)
    world.flush()
    world.submit(new_request())
    world.flush()
    assert not world.ends  # what is known of its blocks may be out of date
    world.beat(D)
    world.flush()
    assert world.outcome("r") == "BlockPoolExhausted"


def test_a_crowd_is_not_offered_all_at_once_after_a_refusal() -> None:
    world = World()
    world.join("decode-0", Role.DECODE, max_num_seqs=4)
    for index in range(20):
        world.submit(new_request(f"r{index}", max_tokens=50))
    assert len(sent(world, StartDecode)) == 4
    world.flush()
    assert world.registry.num_waiting == 16
    world.sent.clear()
    for _ in range(10):
        world.beat(D)
        world.flush()
    assert len(sent(world, StartDecode)) == 10
    world.run()
    assert set(map(world.outcome, world.requests)) == {"length"}


def introduced(world: World) -> set[tuple[WorkerId, WorkerId]]:
    return {(s.worker, s.message.peer) for s in sent(world, ConnectPeer)}  # type: ignore[union-attr]


def test_after_a_failed_transfer_the_decode_worker_reads_the_prompt_and_the_pair_meets_again(
    world: World,
) -> None:
    attempt = up_to_prefill(world)
    world.sent.clear()
    hear(world, P, AttemptFailed(attempt=attempt, code="UNAVAILABLE", message="cable", retryable=True))
    assert introduced(world) == {(P, D), (D, P)}
    start = sent(world, StartDecode)[0].message
    assert isinstance(start, StartDecode)
    assert start.prefill_worker is None
    world.run()
    assert world.outcome("r") == "length"
    world.submit(new_request("next"))
    assert sent(world, StartDecode)[-1].message.prefill_worker == P  # type: ignore[union-attr]


def test_a_decode_worker_that_forgot_its_peer_meets_it_again(world: World) -> None:
    world.submit(new_request())
    world.sent.clear()
    attempt = AttemptId(RequestId("r"), 0)
    hear(world, D, Refused(attempt=attempt, reason=RefusalReason.UNKNOWN_PEER, detail="prefill-0"))
    assert introduced(world) == {(P, D), (D, P)}


def test_a_full_queue_refuses_with_a_hint_when_to_come_back() -> None:
    settings = RegistrySettings(max_queued_requests=2, max_attempts=3, lease_s=3.0, transfer_deadline_s=3.0)
    world = World(settings)
    for name in ("a", "b", "c"):
        world.submit(new_request(name))
    assert set(world.ends) == {"c"}
    error = world.ends[RequestId("c")].outcome
    assert isinstance(error, Overloaded)
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 30


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


@pytest.mark.parametrize(
    ("lost", "steps"), [("prefill-0", 1), ("prefill-0", 2), ("decode-0", 1), ("decode-0", 6)]
)
def test_a_lost_worker_costs_its_requests_a_pause_and_no_token(world: World, lost: str, steps: int) -> None:
    role = Role.PREFILL if lost.startswith("prefill") else Role.DECODE
    world.join(f"{role.value}-1", role)
    for index in range(6):
        world.submit(new_request(f"r{index}", max_tokens=8))
    for _ in range(steps):
        for worker in list(world.workers):
            world.step(worker)
        while world.pushes:
            world.land(0)
        world.flush()
    world.end_process(lost)
    world.run()
    assert set(map(world.outcome, world.requests)) == {"length"}
    assert any(end.report.attempts == 2 for end in world.ends.values())
    world.assert_at_rest()


def test_a_silent_prefill_worker_keeps_its_peers_blocks_quarantined_until_its_process_ends(
    world: World,
) -> None:
    up_to_prefill(world)
    world.lose("prefill-0")
    world.run()
    decode = world.workers[D]
    assert isinstance(decode, ModelDecode)
    assert world.outcome("r") == "length"  # read by the decode worker itself
    assert [r.quarantined for r in decode.reservations.values()] == [True]
    assert sent(world, DropPeer) == []
    world.end_process("prefill-0")
    world.run()
    assert [s.worker for s in sent(world, DropPeer)] == [D]
    world.assert_at_rest()


def test_a_retry_carries_on_from_the_tokens_that_were_streamed(world: World) -> None:
    world.submit(new_request(max_tokens=6))
    world.flush()
    for _ in range(5):  # the prompt's stages
        world.step(P)
        while world.pushes:
            world.land(0)
        world.flush()
    world.step(D)
    world.flush()
    streamed = list(world.output[RequestId("r")])
    assert len(streamed) == 2
    world.sent.clear()
    world.join("decode-0", Role.DECODE, epoch=2)
    spec = sent(world, StartDecode)[0].message.spec  # type: ignore[union-attr]
    assert spec.attempt.epoch == 1
    assert spec.tokens == [1, 2, 3, *streamed]
    assert (spec.num_prompt_tokens, spec.num_output_tokens) == (3, 2)
    world.run()
    assert world.output[RequestId("r")] == continuation([1, 2, 3], 6)


def test_a_request_that_keeps_failing_ends_with_the_error(world: World) -> None:
    decode = world.workers[D]
    assert isinstance(decode, ModelDecode)
    world.submit(new_request())
    for epoch in range(SETTINGS.max_attempts):
        world.deliver_down(D)
        world.flush()
        world.up[D] += decode.fail(AttemptId(RequestId("r"), epoch))
        world.deliver_up(D)
    error = world.ends[RequestId("r")].outcome
    assert isinstance(error, TransferError)
    assert "decode-0: cable" in str(error)
    world.run()
    world.assert_at_rest()


def test_a_failure_that_cannot_be_retried_ends_the_request(world: World) -> None:
    attempt = up_to_prefill(world)
    hear(world, D, AttemptFailed(attempt=attempt, code="DATA_LOSS", message="digest", retryable=False))
    assert world.outcome("r") == "CorruptTransfer"


def test_a_prompt_the_worker_finds_too_long_is_the_clients_mistake(world: World) -> None:
    world.submit(new_request())
    attempt = AttemptId(RequestId("r"), 0)
    hear(world, D, Refused(attempt=attempt, reason=RefusalReason.TOO_LONG, detail=""))
    assert isinstance(world.ends[RequestId("r")].outcome, InvalidRequest)


def test_tokens_that_never_came_make_a_new_attempt_rather_than_a_gap(world: World) -> None:
    attempt = up_to_prefill(world)
    hear(world, D, Tokens(attempt=attempt, first_index=3, tokens=[7]))
    assert world.output[RequestId("r")] == []
    world.run()
    assert world.ends[RequestId("r")].report.attempts == 2


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


def test_without_a_decode_worker_a_request_waits_a_while_and_then_fails() -> None:
    world = World()
    world.submit(new_request())
    world.tick(29.0)
    assert not world.ends
    world.tick(1.0)
    assert world.outcome("r") == "NoWorkers"


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
