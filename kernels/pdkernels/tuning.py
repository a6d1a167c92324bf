"""Launch configurations per GPU model. Looked up, never searched for at start-up.

An unknown GPU gets the default of its generation, which is chosen to compile without spills there
(docs/kernels.md), not measured for speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    block_m: int
    """Rows of a query tile: tokens times the query heads of one kv head."""
    block_n: int
    """KV tokens per iteration."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Attention configurations of one GPU model, by bytes per element and padded head_dim."""

    measured: bool
    """Whether the entries were timed on this model."""
    programs_per_sm: int = 2
    """Decode programs resident on a multiprocessor, for the split planner."""
    prefill: Mapping[tuple[int, int], LaunchConfig] = field(default_factory=dict)
    decode: Mapping[tuple[int, int], LaunchConfig] = field(default_factory=dict)


_DECODE: Final = {
    (2, 64): LaunchConfig(block_m=16, block_n=64, num_warps=4, num_stages=4),
    (2, 128): LaunchConfig(block_m=16, block_n=64, num_warps=4, num_stages=3),
    (2, 256): LaunchConfig(block_m=16, block_n=32, num_warps=4, num_stages=3),
    (4, 64): LaunchConfig(block_m=16, block_n=32, num_warps=4, num_stages=3),
    (4, 128): LaunchConfig(block_m=16, block_n=16, num_warps=4, num_stages=2),
    (4, 256): LaunchConfig(block_m=16, block_n=16, num_warps=8, num_stages=2),
}
_PREFILL_FP32: Final = {
    (4, 64): LaunchConfig(block_m=32, block_n=32, num_warps=4, num_stages=2),
    (4, 128): LaunchConfig(block_m=32, block_n=16, num_warps=8, num_stages=2),
    (4, 256): LaunchConfig(block_m=16, block_n=16, num_warps=8, num_stages=1),
}

DEFAULTS: Final[Mapping[int, DeviceConfig]] = {
    8: DeviceConfig(
        measured=False,
        prefill=_PREFILL_FP32
        | {
            (2, 64): LaunchConfig(block_m=128, block_n=64, num_warps=8, num_stages=3),
            (2, 128): LaunchConfig(block_m=64, block_n=64, num_warps=8, num_stages=3),
            (2, 256): LaunchConfig(block_m=64, block_n=32, num_warps=8, num_stages=2),
        },
        decode=_DECODE,
    ),
    9: DeviceConfig(
        measured=False,
        prefill=_PREFILL_FP32
        | {
            (2, 64): LaunchConfig(block_m=128, block_n=64, num_warps=4, num_stages=3),
            (2, 128): LaunchConfig(block_m=128, block_n=64, num_warps=8, num_stages=3),
            (2, 256): LaunchConfig(block_m=64, block_n=32, num_warps=8, num_stages=2),
        },
        decode=_DECODE,
    ),
}
"""By the major number of the compute capability; newer GPUs get the newest entry."""

BY_MODEL: Final[Mapping[str, DeviceConfig]] = {}
"""Device name, as the driver reports it, to what was measured there. Nothing has been measured yet."""

assumed_capability: Final[ContextVar[int]] = ContextVar("assumed_capability", default=9)
"""What tensors that are on no GPU stand for: the interpreter's, and those of the compile report."""

INTERPRETER_PROGRAMS: Final = 16
"""Stands for the device's program slots on a CPU, so that splits happen there too."""


def device_config(device: torch.device) -> DeviceConfig:
    """The configuration of the GPU a tensor is on."""
    if device.type != "cuda":
        return DEFAULTS[assumed_capability.get()]
    index = device.index or 0
    return BY_MODEL.get(_device_name(index)) or DEFAULTS[min(max(_capability(index), 8), max(DEFAULTS))]


def program_slots(device: torch.device) -> int:
    """Decode programs the device runs at once."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return _num_sms(device.index or 0) * device_config(device).programs_per_sm


def attention_config(
    table: Mapping[tuple[int, int], LaunchConfig], itemsize: int, block_d: int
) -> LaunchConfig:
    """The entry for an element size and padded head_dim; the next larger head_dim's where there is none."""
    sizes = sorted(d for size, d in table if size == itemsize and d >= block_d)
    if not sizes:
        raise KeyError(f"no attention configuration for {itemsize} bytes and head_dim {block_d}")
    return table[itemsize, sizes[0]]


def has_fp8(device: torch.device) -> bool:
    """Whether the GPU converts FP8 numbers itself (Ada, Hopper and newer)."""
    if device.type != "cuda":
        return assumed_capability.get() >= 9
    return torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


@cache
def _num_sms(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
