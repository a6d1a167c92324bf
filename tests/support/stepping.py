"""Drive a `ModelRunner` over one or many sequences as a scheduler would, with scattered block tables."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from pdserve.core.ids import BlockId
from pdserve.engine.batch import Logits, SequenceSlice
from pdserve.engine.build import Engine


@dataclass
class Sequence:
    """Tokens of one sequence, how many are in the pool, and its blocks."""

    tokens: list[int]
    blocks: list[BlockId]
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def take(self, count: int, logits: Logits = Logits.ALL) -> SequenceSlice:
        return SequenceSlice(
            tokens=self.tokens[self.done : self.done + count],
            start=self.done,
            blocks=self.blocks,
            logits=logits,
        )


class BlockDealer:
    """Gives away a pool's blocks in random order, each once."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self._block_tokens = engine.block_tokens
        self._free = [BlockId(i) for i in range(engine.num_blocks)]
        random.Random(seed).shuffle(self._free)

    def sequence(self, tokens: list[int], room: int = 0) -> Sequence:
        count = -(-(len(tokens) + room) // self._block_tokens)
        return Sequence(list(tokens), [self._free.pop() for _ in range(count)])


def step(engine: Engine, parts: list[tuple[Sequence, int]]) -> None:
    """One forward in which each sequence computes its next `count` tokens; appends its logits rows."""
    logits = engine.runner.forward([sequence.take(count) for sequence, count in parts])
    row = 0
    for sequence, count in parts:
        sequence.logits.extend(logits[row : row + count])
        sequence.done += count
        row += count
    assert row == logits.shape[0]


def greedy(engine: Engine, sequence: Sequence, new_tokens: int, chunk: int) -> list[int]:
    """Read the prompt in chunks, then decode; returns the new tokens."""
    prompt = len(sequence.tokens)
    while sequence.done < prompt:
        step(engine, [(sequence, min(chunk, prompt - sequence.done))])
    while True:
        sequence.tokens.append(int(sequence.logits[-1].argmax()))
        if len(sequence.tokens) == prompt + new_tokens:
            return sequence.tokens[prompt:]
        step(engine, [(sequence, 1)])
