"""The compiled library as typed Python: structures, signatures, and the helpers of this process.

Addresses are plain integers (`Tensor.data_ptr()`); whoever passes one keeps the memory alive. Every call
releases the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint8, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdcpu.build import KernelsUnavailable, build, recipe

ABI: Final = 2
PANEL: Final = 64
"""Outputs of one panel of a packed weight, and keys of one panel of attention."""


class Weight(ctypes.Structure):
    _fields_ = (("panels", c_void_p), ("bias", c_void_p), ("outputs", c_int64), ("inputs", c_int64))


class PoolShape(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("layers", c_int64),
        ("kv_heads", c_int64),
        ("block_tokens", c_int64),
        ("head_dim", c_int64),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Weight),
        ("out", Weight),
        ("gate_up", Weight),
        ("down", Weight),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("eps", c_float),
        ("qk_eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("pool", PoolShape),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64),
        ("num_slices", c_int64),
        ("num_tasks", c_int64),
        ("positions", c_void_p),
        ("row_slice", c_void_p),
        ("slices", c_void_p),
        ("tables", c_void_p),
        ("tasks", c_void_p),
    )


_SIGNATURES: Final = {
    "pd_abi": (c_int32, ()),
    "pd_instructions": (c_char_p, ()),
    "pd_set_helpers": (None, (c_int32, c_void_p, c_void_p, c_void_p)),
    "pd_patience": (None, (c_int64, c_void_p, c_void_p, c_void_p, c_void_p)),
    "pd_packed_bytes": (c_int64, (c_int64, c_int64)),
    "pd_padded_row": (c_int64, (c_int64,)),
    "pd_pack": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "pd_linear": (None, (POINTER(Weight), c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "pd_norm_linear": (None, (POINTER(Weight), c_void_p, c_void_p, c_float, c_int64, c_void_p, c_void_p)),
    "pd_work_bytes": (c_int64, (POINTER(Model), c_int64, c_int64)),
    "pd_layers": (
        c_int64,
        (
            POINTER(Model),
            POINTER(Layer),
            c_int64,
            c_int64,
            c_int64,
            POINTER(Step),
            c_void_p,
            c_void_p,
            c_int64,
            c_void_p,
        ),
    ),
    "pd_rope_and_write": (
        None,
        (POINTER(Model), POINTER(Step), c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "pd_attention": (None, (POINTER(Model), POINTER(Step), c_int64, c_void_p, c_void_p)),
}


@dataclass(frozen=True, slots=True)
class HelperCore:
    """Where one helping thread runs."""

    cpu: int | None
    """The core it is pinned to; None: anywhere."""
    owners: tuple[int, ...] = ()
    """Addresses of bytes that are nonzero while an owner of the core is busy; the helper then stays away."""
    memory: object = None
    """What the addresses point into: kept as long as the helper."""


class Library:
    """The functions of `src/pdcpu.cpp`, each as an attribute of its name without `pd_`."""

    def __init__(self, path: Path) -> None:
        """Raises `KernelsUnavailable` when the file cannot be loaded or is another version's."""
        try:
            self._dll = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._dll, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise KernelsUnavailable(f"cannot load {path}: {error}", f"remove {path}") from error
        dll = self._dll
        if dll.pd_abi() != ABI:
            raise KernelsUnavailable(f"{path} is of another version", f"remove {path}")
        self.instructions: str = dll.pd_instructions().decode()
        self.packed_bytes, self.padded_row, self.pack = dll.pd_packed_bytes, dll.pd_padded_row, dll.pd_pack
        self.linear, self.norm_linear = dll.pd_linear, dll.pd_norm_linear
        self.work_bytes, self.layers = dll.pd_work_bytes, dll.pd_layers
        self.rope_and_write, self.attention = dll.pd_rope_and_write, dll.pd_attention
        self._helpers: tuple[HelperCore, ...] = ()
        self._helping = threading.Lock()

    @property
    def helpers(self) -> tuple[HelperCore, ...]:
        return self._helpers

    def set_helpers(self, helpers: Sequence[HelperCore]) -> None:
        """The threads that compute beside the caller's from now on; replaces those there were."""
        with self._helping:
            cpus = (c_int32 * len(helpers))(*(-1 if h.cpu is None else h.cpu for h in helpers))
            owners = [address for helper in helpers for address in helper.owners]
            first = [0]
            for helper in helpers:
                first.append(first[-1] + len(helper.owners))
            firsts, addresses = (c_int32 * len(first))(*first), (c_void_p * len(owners))(*owners)
            self._dll.pd_set_helpers(len(helpers), cpus, firsts, addresses)
            self._helpers = tuple(helpers)

    def rests_after(self, loops: Sequence[tuple[int, int, int]]) -> list[bool]:
        """Whether helpers on borrowed cores would rest after each of these loops.

        Nanoseconds: how long it was shared, how long the caller then waited for a helper's tile, and when.
        """
        columns = [(c_int64 * len(loops))(*column) for column in zip(*loops, strict=True)]
        rests = (c_uint8 * len(loops))()
        self._dll.pd_patience(len(loops), *columns, rests)
        return [bool(rest) for rest in rests]


_computing: list[Library] = []


def computing() -> Library | None:
    """The library that models of this process compute with, from `compute_with` on."""
    return _computing[-1] if _computing else None


def compute_with(library: Library) -> None:
    """A model computes with `library` alone: its helpers are worth the process's cores."""
    _computing[:] = [library]


@functools.cache
def load(instructions: str | None = None) -> Library:
    """The library for this CPU (or for the instruction set given), built if it is not there yet.

    One per process: its helpers are the process's. Raises `KernelsUnavailable`.
    """
    return Library(build(recipe(instructions)))
