"""A decode worker dies in the middle of an answer: it goes on with the very tokens it would have had."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pdserve.core.messages import Role
from tests.support.deployment import scenario
from tests.worker.test_migration import GREEDY, PENALISED, SAMPLED, Streaming, prompt_of, system


@scenario
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("reader", ["lives", "is gone"])
async def test_every_sample_goes_on_exactly_after_a_second_push_or_after_reading_it_again(
    tmp_path: Path, params: dict[str, Any], reader: str
) -> None:
    """The reader lives: what it has cached is pushed a second time. It is gone: everything is read again."""
    async with system(tmp_path) as running:
        hit = Streaming(running, prompt_of(30, 1), n=3, **params)
        await hit.reaches(8)
        placed = [w.id for w in running.coordinator.snapshot().workers if w.role is Role.DECODE and w.placed]
        if reader == "is gone":
            await running.lose("prefill-0")
        await running.lose(str(placed[0]))
        await hit.end()
        assert hit.error is None
        calm = Streaming(running, prompt_of(30, 1), n=3, **params)
        await calm.end()
        assert hit.tokens == calm.tokens
        assert hit.timings.attempts > 1
        if params is GREEDY:
            hit.right(**params)
        else:
            assert len({tuple(tokens) for tokens in hit.tokens.values()}) > 1
        await asyncio.to_thread(running.every_block_is_back)
