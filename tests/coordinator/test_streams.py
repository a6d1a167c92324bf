"""Tokens that wait while a write is under way leave together; the first one waits for nobody."""

from __future__ import annotations

import asyncio

from coordinator.events import Emit
from coordinator.streams import RequestStream
from tests.support.deployment import scenario
from tests.support.registry_world import new_request


def emit(*tokens: int) -> Emit:
    return Emit(request=new_request().id, tokens=list(tokens), logprobs=[], gap_s=None)


@scenario
async def test_the_first_token_wakes_a_reader_that_waits_and_comes_alone() -> None:
    stream = RequestStream((new_request(),))
    reading = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not reading.done()
    stream.feed(emit(1))
    assert await reading == [emit(1)]


@scenario
async def test_whatever_comes_while_the_reader_writes_is_one_batch() -> None:
    stream = RequestStream((new_request(),))
    stream.feed(emit(1))
    assert await stream.take() == [emit(1)]
    for token in range(2, 50):  # the reader is in the middle of a write
        stream.feed(emit(token))
    batch = await stream.take()
    assert [token for output in batch for token in output.tokens] == list(range(2, 50))  # type: ignore[union-attr]
