"""What fails costs a pause and no token, or ends the request with its error."""

from __future__ import annotations

import pytest

from pdserve.core.errors import InvalidRequest, TransferError
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import (
    AttemptFailed,
    ConnectPeer,
    DropPeer,
    RefusalReason,
    Refused,
    Role,
    StartDecode,
    Tokens,
)
from tests.support.model_workers import ModelDecode, continuation
from tests.support.registry_steps import hear, pair, sent, up_to_prefill
from tests.support.registry_world import SETTINGS, World, new_request

P, D = WorkerId("prefill-0"), WorkerId("decode-0")


@pytest.fixture
def world() -> World:
    return pair()


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
