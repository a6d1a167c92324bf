"""Errors of the kernels.

PdServeError
├── ConfigError
│   └── TritonUnavailable     (also ImportError) the optional dependency is not installed
└── InvariantViolated
    └── KernelInputError      a wrapper was called with tensors its kernel cannot take: our own bug
"""

from __future__ import annotations

from pdserve.core.errors import ConfigError, InvariantViolated


class TritonUnavailable(ConfigError, ImportError):
    def __init__(self) -> None:
        super().__init__(
            "the Triton kernels need the package `triton`, which is not installed; "
            "install pdserve with its `gpu` extra (pip install 'pdserve[gpu]'), or run on device 'cpu'"
        )


class KernelInputError(InvariantViolated):
    def __init__(self, op: str, argument: str, *, wanted: str, found: object) -> None:
        self.op, self.argument = op, argument
        super().__init__(f"{op}: {argument} must be {wanted}, found {found}")
