"""The one place that imports Triton, and gives its decorator a type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from pdkernels.errors import TritonUnavailable

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise TritonUnavailable from missing

__all__ = ["Grid", "Kernel", "interpreted", "jit", "jit_for_any", "tl", "triton"]


Grid = tuple[int, ...]


class Kernel(Protocol):
    """A jitted function: launched as `kernel[grid](...)`, or called by another kernel."""

    __name__: str

    def __getitem__(self, grid: Grid) -> Callable[..., object]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def jit(fn: Callable[..., Any]) -> Kernel:
    """`triton.jit`. Under TRITON_INTERPRET=1 (set before Triton is imported) kernels run on the CPU."""
    return cast(Kernel, triton.jit(fn))


def jit_for_any(*names: str) -> Callable[[Callable[..., Any]], Kernel]:
    """`jit` whose integer arguments `names` change at run time and must not cause another compilation."""

    def decorate(fn: Callable[..., Any]) -> Kernel:
        return cast(Kernel, triton.jit(fn, do_not_specialize=list(names)))

    return decorate


def interpreted() -> bool:
    """Whether kernels run on the CPU under Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)
