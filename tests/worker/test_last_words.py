"""An attempt is not settled before the push that says so is over: it writes, too."""

from __future__ import annotations

from kvtransfer.protocol import Outcome, Push, PushEnded
from pdserve.core.ids import AttemptId, BlockId, RequestId, WorkerId
from pdserve.core.messages import PushesSettled
from pdserve.worker.events import OwnerId, Send
from pdserve.worker.last_words import LastWords

ATTEMPT = AttemptId(RequestId("r"), 0)


def push(number: int) -> Push:
    return Push(
        id=number,
        peer=WorkerId("decode-0"),
        group=0,
        src_blocks=(BlockId(0),),
        dst_blocks=(BlockId(9),),
        layers=(0, 1),
        note=b"",
        deadline=5.0,
    )


def test_whoever_asks_while_it_travels_is_answered_when_nothing_can_land_any_more() -> None:
    words = LastWords()
    words.say(ATTEMPT, push(3))
    words.ask(ATTEMPT, OwnerId(7))
    words.ask(ATTEMPT, OwnerId(8))
    assert words.ended(PushEnded(id=3, outcome=Outcome.TIMED_OUT)) == []
    assert ATTEMPT in words
    settled = PushesSettled(attempt=ATTEMPT)
    answers = words.ended(PushEnded(id=3, outcome=Outcome.FAILED))
    assert answers == [Send(OwnerId(7), settled), Send(OwnerId(8), settled)]
    assert ATTEMPT not in words
    assert len(words) == 0


def test_the_end_of_another_push_means_nothing() -> None:
    words = LastWords()
    words.say(ATTEMPT, push(3))
    assert words.ended(PushEnded(id=4, outcome=Outcome.COMPLETED)) == []
    assert len(words) == 1
