"""The library for each instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pdcpu.build import INSTRUCTION_SETS, KernelsUnavailable, cpu_flags, find_compiler
from pdcpu.library import Library, load

HERE = [name for name, (wanted, _) in INSTRUCTION_SETS.items() if wanted <= cpu_flags()]


@pytest.fixture(params=HERE or ["none"])
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    if not HERE or find_compiler() is None:
        pytest.skip("no CPU or no compiler for these kernels")
    try:
        loaded = load(request.param)
    except KernelsUnavailable as error:
        pytest.fail(str(error))
    yield loaded
    loaded.set_helpers(())
