"""Where a mixture's weights lie in a checkpoint.

Three spellings, under `model.layers.N.`:

    block_sparse_moe.gate, .experts.J.{w1, w3, w2}                  Mixtral (w1 gate, w3 up, w2 down)
    mlp.gate, .experts.J.{gate_proj, up_proj, down_proj}            Qwen3-MoE
    mlp.gate, .experts.{gate_up_proj, down_proj} of all experts     either, in transformers 5's own order

Shape legend: E hidden, F ff of one expert, X experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set

import torch
from torch import Tensor

from pdserve.models.config import MoeConfig

Read = Callable[[str, Sequence[int]], Tensor]
"""A tensor by name and shape, as stored."""


def router_name(names: Set[str], prefix: str) -> str:
    """prefix: such as `model.layers.0.`."""
    mixtral = prefix + "block_sparse_moe.gate.weight"
    return mixtral if mixtral in names else prefix + "mlp.gate.weight"


def expert_weights(
    read: Read, names: Set[str], prefix: str, moe: MoeConfig, hidden: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """(gate over up [2F, E], down [E, F]) of every expert in turn. Raises `CheckpointError`s."""
    width, together = moe.intermediate_size, prefix + "mlp.experts."
    if together + "gate_up_proj" in names:
        gate_up = read(together + "gate_up_proj", (moe.num_experts, 2 * width, hidden))
        down = read(together + "down_proj", (moe.num_experts, hidden, width))
        for expert in range(moe.num_experts):
            yield gate_up[expert].to(dtype), down[expert].to(dtype)
        return
    is_mixtral = router_name(names, prefix).startswith(prefix + "block_sparse_moe")
    folder = prefix + "block_sparse_moe.experts." if is_mixtral else together
    gate, up, down_name = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    for expert in range(moe.num_experts):
        parts = [read(f"{folder}{expert}.{part}.weight", (width, hidden)).to(dtype) for part in (gate, up)]
        yield torch.cat(parts), read(f"{folder}{expert}.{down_name}.weight", (hidden, width)).to(dtype)
