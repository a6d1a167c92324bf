"""CPU engines over small checkpoints, and the answers they must give."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pdserve.core.config import CacheSettings, DType, ModelSettings
from pdserve.engine.build import Engine, build_engine
from tests.support.stepping import BlockDealer, greedy
from tests.support.tiny_models import VOCAB

BLOCK = 8


def engine_for(path: Path, dtype: DType = DType.FLOAT32, blocks: int = 64, block: int = BLOCK) -> Engine:
    return build_engine(
        path,
        ModelSettings(dtype=dtype),
        CacheSettings(block_size=block, num_blocks=blocks),
        device="cpu",
        num_threads=None,
    )


def prompt_of(length: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed * 1000 + length)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def check_reference(engine: Engine, reference: Path, max_tokens: int) -> None:
    """Greedy tokens of each case of a reference.json."""
    for case in json.loads(reference.read_text())["cases"]:
        want = case["greedy_ids"][:max_tokens]
        sequence = BlockDealer(engine).sequence(case["prompt_ids"], room=len(want))
        assert greedy(engine, sequence, len(want), chunk=16) == want, case["prompt"]
        first = sequence.logits[len(case["prompt_ids"]) - 1]
        for token, logit in case["first_step_top5"]:
            assert float(first[token]) == pytest.approx(logit, abs=2e-3)
