"""An engine whose "model" is a hash of what it reads from the KV pool.

The KV of (layer, position) is a number that depends on the token, the layer and the KV of the position
before. The next token's logits depend on the KV of every layer and position. All of it is read back from
the pool, so a block that is lost, misplaced, overwritten or late changes the tokens; `reference` says what
they should be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import Logits, Sampled, SampleRequest, SequenceSlice
from pdserve.engine.kv_pool import KVPool
from pdserve.engine.sampler import Sampler

VOCAB = 97
NUM_LAYERS = 4
BLOCK_TOKENS = 4
_PRIME = 8_388_593  # float32 holds every integer below 2^24 exactly


def _kv(before: int, token: int, layer: int) -> int:
    return (before * 31 + (token + 1) * 1009 + (layer + 1) * 7919) % _PRIME


def _logits(kv_LP: np.ndarray) -> np.ndarray:
    """float32 [VOCAB] from the KV [layer, position] of a whole sequence."""
    weights_P = np.arange(1, kv_LP.shape[1] + 1, dtype=np.int64)
    seed = [int(total) for total in (kv_LP.astype(np.int64) * weights_P).sum(axis=1)]
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)


def reference(prompt: Sequence[int], params: SamplingParams, count: int) -> list[int]:
    """The first `count` tokens after `prompt`, computed without any pool."""
    sampler = Sampler(VOCAB, "cpu")
    tokens = list(prompt)
    for _ in range(count):
        kv_LP = np.zeros((NUM_LAYERS, len(tokens)), dtype=np.int64)
        for layer in range(NUM_LAYERS):
            before = 0
            for position, token in enumerate(tokens):
                before = kv_LP[layer, position] = _kv(before, token, layer)
        request = SampleRequest(params=params, tokens=tokens, num_prompt_tokens=len(prompt), eos_token_ids=())
        (sampled,) = sampler.sample(torch.from_numpy(_logits(kv_LP))[None], [request])
        assert isinstance(sampled, Sampled)
        tokens.append(sampled.token)
    return tokens[len(prompt) :]


class TokenRunner:
    """`RunnerPort`. `before_step` may block or raise, to script what a step does."""

    def __init__(self, num_blocks: int, max_model_len: int, block_tokens: int) -> None:
        group = CacheGroup(name="kv", num_layers=NUM_LAYERS, num_kv_heads=1, head_dim=1, dtype="float32")
        self.pools = (KVPool(GroupLayout(group=group, block_tokens=block_tokens), num_blocks, "cpu"),)
        self.max_model_len = max_model_len
        self.before_step: Callable[[Sequence[SequenceSlice]], None] = lambda slices: None
        self.steps: list[list[tuple[int, int]]] = []
        """(start, number of tokens) of each slice of each step."""
        self._block_tokens = block_tokens
        self._pool = self.pools[0].tensor
        self._pool.fill_(-1.0)  # poison: unwritten KV is never a valid number

    def forward(
        self,
        slices: Sequence[SequenceSlice],
        *,
        layer_groups: int = 1,
        on_layers_done: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        self.before_step(slices)
        self.steps.append([(s.start, len(s.tokens)) for s in slices])
        edges = np.linspace(0, NUM_LAYERS, min(layer_groups, NUM_LAYERS) + 1).astype(int).tolist()
        for first, last in itertools.pairwise(edges):
            for s in slices:
                self._write(s, first, last)
            if on_layers_done is not None:
                on_layers_done(first, last)
        rows = [self._row(s, end) for s in slices for end in _row_ends(s)]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, VOCAB), np.float32))

    def _write(self, s: SequenceSlice, first: int, last: int) -> None:
        for layer in range(first, last):
            before = int(self._read(s, layer, s.start)[-1]) if s.start else 0
            for offset, token in enumerate(s.tokens):
                before = _kv(before, token, layer)
                block, slot = divmod(s.start + offset, self._block_tokens)
                self._pool[s.blocks[block], layer, :, 0, slot, 0] = float(before)

    def _read(self, s: SequenceSlice, layer: int, end: int) -> np.ndarray:
        """K of positions [0, end), which must equal V."""
        kv_B2T = self._pool[list(s.blocks), layer, :, 0, :, 0].numpy()
        k_P, v_P = kv_B2T[:, 0].reshape(-1)[:end], kv_B2T[:, 1].reshape(-1)[:end]
        assert (k_P == v_P).all(), "a torn block"
        return k_P

    def _row(self, s: SequenceSlice, end: int) -> np.ndarray:
        return _logits(np.stack([self._read(s, layer, end) for layer in range(NUM_LAYERS)]))


def _row_ends(s: SequenceSlice) -> list[int]:
    end = s.start + len(s.tokens)
    return {Logits.NONE: [], Logits.LAST: [end], Logits.ALL: list(range(s.start + 1, end + 1))}[s.logits]


@dataclass(slots=True)
class TokenEngine:
    """`EnginePort`."""

    num_blocks: int = 64
    block_tokens: int = BLOCK_TOKENS
    max_model_len: int = 160
    model: str = "token-engine"
    runner: TokenRunner = field(init=False)
    sampler: Sampler = field(init=False)
    fingerprint: Fingerprint = field(init=False)

    def __post_init__(self) -> None:
        self.runner = TokenRunner(self.num_blocks, self.max_model_len, self.block_tokens)
        self.sampler = Sampler(VOCAB, "cpu")
        self.fingerprint = Fingerprint(
            protocol=PROTOCOL_VERSION, model=self.model, layouts=(self.runner.pools[0].layout,)
        )
