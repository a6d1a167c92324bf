"""Which operations a CPU engine computes with, and with how many threads."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from pdcpu.build import KernelsUnavailable, recipe
from pdcpu.library import HelperCore, Library, load

from pdserve.models.config import ModelConfig
from pdserve.models.cpu_native import NativeOps
from pdserve.models.ops import Workload
from pdserve.models.ops_cpu import CpuOps

log = logging.getLogger(__name__)


def make_cpu_ops(
    config: ModelConfig,
    device: torch.device,
    max_positions: int,
    workload: Workload,
    say: Callable[[str], None],
) -> CpuOps:
    """pdcpu's kernels for bfloat16 models where they can be had, else plain torch.

    say: told before a wait of seconds, when the kernels are compiled for the first time on this machine.
    """
    library = native_library(say) if config.dtype == "bfloat16" else None
    if library is None:
        return CpuOps(config, device, max_positions, workload)
    set_threads(torch.get_num_threads(), library)
    return NativeOps(config, device, max_positions, workload, library)


def native_library(say: Callable[[str], None]) -> Library | None:
    """None, with a warning in the log, where there is none."""
    try:
        if not recipe().built:
            say("compiling the CPU kernels (once per machine)")
        return load()
    except KernelsUnavailable as error:
        advice = f"; {error.advice}" if error.advice else ""
        log.warning("computing with torch alone, which is slower: %s%s", error, advice)
        return None


def set_threads(count: int, library: Library) -> None:
    """Threads of this process's kernels, the caller's included; they may run on any core it may use."""
    wanted = (HelperCore(None),) * (count - 1)
    if library.helpers != wanted:
        library.set_helpers(wanted)
