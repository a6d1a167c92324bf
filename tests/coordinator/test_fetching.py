"""The beginning of a prompt is asked of a worker that has it, where that is sooner than reading it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest

from coordinator.events import FromWorker, Send
from coordinator.fetch_tally import FetchOutcome
from coordinator.fleet import WorkerState
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    ConnectPeer,
    KvArrived,
    Message,
    PushesSettled,
    PushPrefix,
    ReceivePrefix,
    RefusalReason,
    Refused,
    Reserved,
    Role,
    StartDecode,
    TransferDone,
    Up,
)
from pdserve.core.prefix import PrefixHashes, pack_keys
from pdserve.core.worker_state import PrefixEvents
from tests.support.model_workers import LAYOUT
from tests.support.registry_world import MODEL, SETTINGS, World, new_request

M = TypeVar("M")
HAS, LACKS = WorkerId("decode-0"), WorkerId("decode-1")
SIZE = LAYOUT.block_tokens
PROMPT = list(range(1, 8 * SIZE + 2))


def state(world: World, worker: WorkerId) -> WorkerState:
    found = world.registry.fleet.get(worker)
    assert found is not None
    return found


def world_of(*, rate: float = 1e9, settings: bool = True) -> World:
    """Two workers that read for themselves: one has the prompt but no room, the other reads 100 tokens/s."""
    world = World(replace(SETTINGS, fetch_prefixes=settings))
    for worker in (HAS, LACKS):
        world.join(worker, Role.DECODE)
    hashes = PrefixHashes(b"salt", SIZE).of(PROMPT)
    events = PrefixEvents(
        worker=HAS, epoch=1, sequence=0, stored=pack_keys(hashes), evicted=b"", snapshot=True
    )
    world.handle(FromWorker(worker=HAS, epoch=1, message=events))
    for tokens in range(10, 30):
        state(world, LACKS).latency.prefill.learn((1, tokens, tokens * tokens / 2), tokens / 100)
    world.registry.fleet.links.moved(HAS, LACKS, int(rate), 1.0)
    state(world, HAS).refused()
    world.sent.clear()
    return world


def asked(world: World) -> AttemptId:
    world.submit(new_request(prompt=PROMPT))
    receive = sent(world, ReceivePrefix)
    assert receive.writer == HAS
    assert receive.tokens == PROMPT[: 8 * SIZE]
    assert not any(isinstance(action.message, StartDecode) for action in world.sent)
    return receive.attempt


def sent(world: World, kind: type[M]) -> M:
    (found,) = [action.message for action in world.sent if isinstance(action.message, kind)]
    return found


def hear(world: World, worker: WorkerId, message: Up) -> list[Message]:
    world.sent.clear()
    actions = world.handle(FromWorker(worker=worker, epoch=1, message=message))
    return [action.message for action in actions if isinstance(action, Send)]


def reserved(attempt: AttemptId) -> Reserved:
    return Reserved(attempt=attempt, blocks=[BlockId(i) for i in range(8)], cached_tokens=0)


def test_it_is_pushed_and_then_the_request_is_offered() -> None:
    world = world_of()
    attempt = asked(world)
    introduced = [action for action in world.sent if isinstance(action.message, ConnectPeer)]
    assert {action.worker for action in introduced} == {HAS, LACKS}
    assert isinstance(world.sent[-1].message, ReceivePrefix)
    (push,) = hear(world, LACKS, reserved(attempt))
    assert isinstance(push, PushPrefix)
    assert push.worker == LACKS
    assert world.registry.num_fetching == 1
    (offer,) = hear(world, LACKS, KvArrived(attempt=attempt))
    assert isinstance(offer, StartDecode)
    done = TransferDone(attempt=attempt, bytes_moved=1, exposed_s=0.0, busy_s=0.1, path="fake")
    assert hear(world, HAS, done) == []
    tally = world.registry.fetched
    assert tally.ended == {(MODEL, FetchOutcome.ARRIVED): 1}
    assert tally.bytes_moved == {(MODEL, "fake"): 1}
    assert world.registry.num_fetching == world.registry.num_unsettled == 0


@pytest.mark.parametrize("how", ["slow link", "switched off", "nothing measured"])
def test_it_is_read_where_moving_is_not_known_to_be_sooner(how: str) -> None:
    world = world_of(rate=10.0 if how == "slow link" else 1e9, settings=how != "switched off")
    if how == "nothing measured":
        world.registry.fleet.links.forget(HAS)
    world.submit(new_request(prompt=PROMPT))
    sent(world, StartDecode)
    # Where it might be, they are made to meet, and measure.
    met = {action.worker for action in world.sent if isinstance(action.message, ConnectPeer)}
    assert met == ({HAS, LACKS} if how == "nothing measured" else set())


def test_a_refusal_means_reading_it() -> None:
    world = world_of()
    attempt = asked(world)
    refused = Refused(attempt=attempt, reason=RefusalReason.NO_BLOCKS, detail="none")
    (offer,) = hear(world, LACKS, refused)
    assert isinstance(offer, StartDecode)
    assert world.registry.fetched.count(FetchOutcome.REFUSED) == 1


def test_a_push_that_fails_means_reading_it_and_its_end_is_told_to_who_waited() -> None:
    world = world_of()
    attempt = asked(world)
    hear(world, LACKS, reserved(attempt))
    failed = AttemptFailed(attempt=attempt, code="UNAVAILABLE", message="it broke", retryable=True)
    cancel, offer = hear(world, HAS, failed)
    assert cancel == Cancel(attempt=attempt, reason="it broke")
    assert isinstance(offer, StartDecode)
    assert hear(world, HAS, PushesSettled(attempt=attempt)) == [PushesSettled(attempt=attempt)]
    assert world.registry.fetched.count(FetchOutcome.FAILED) == 1
    assert not world.registry.fetched.bytes_moved


def test_what_takes_longer_than_reading_is_given_up() -> None:
    world = world_of()
    asked(world)
    world.tick(10.0)
    sent(world, StartDecode)
    assert world.registry.num_fetching == 0
    assert world.registry.fetched.count(FetchOutcome.LATE) == 1


def test_a_lost_holder_means_reading_it() -> None:
    world = world_of()
    hear(world, LACKS, reserved(asked(world)))
    world.sent.clear()
    world.lose(HAS)
    sent(world, StartDecode)
    assert world.registry.fetched.count(FetchOutcome.LOST) == 1
