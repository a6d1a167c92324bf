"""What the workers need of the engine and of the transfer service: where tests put their doubles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from kvtransfer.protocol import PoolRegion, Push, TransferBackend
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint, GroupLayout
from pdserve.core.sampling import TokenLogprobs
from pdserve.engine.batch import SampleRequest, SampleResult, SequenceSlice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OnLayersDone = Callable[[int, int], None]


class PoolPort(Protocol):
    """One cache group's memory."""

    @property
    def layout(self) -> GroupLayout: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def tensor(self) -> Tensor: ...
    @property
    def address(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


class RunnerPort(Protocol):
    """`pdserve.engine.runner.ModelRunner`, as the workers use it."""

    @property
    def pools(self) -> Sequence[PoolPort]: ...
    @property
    def max_model_len(self) -> int: ...

    def forward(
        self,
        slices: Sequence[SequenceSlice],
        *,
        layer_groups: int = 1,
        on_layers_done: OnLayersDone | None = None,
    ) -> Tensor:
        """Float32 logits [rows, vocabulary], rows in slice order: 0, 1 or len(tokens) of each slice."""
        ...


class SamplerPort(Protocol):
    @property
    def vocab_size(self) -> int: ...

    def sample(self, logits_NV: Tensor, requests: Sequence[SampleRequest], /) -> list[SampleResult]: ...

    def prompt_logprobs(
        self, logits_LV: Tensor, next_tokens: Sequence[int], k: int, /
    ) -> list[TokenLogprobs]: ...


class EnginePort(Protocol):
    """`pdserve.engine.build.Engine`, as the workers use it."""

    @property
    def runner(self) -> RunnerPort: ...
    @property
    def sampler(self) -> SamplerPort: ...
    @property
    def fingerprint(self) -> Fingerprint: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...


class TransferPort(Protocol):
    """`kvtransfer.service.TransferService`: nothing here blocks; outcomes come back as events."""

    def start(self) -> None: ...
    def submit(self, push: Push) -> None: ...
    def connect(self, peer: WorkerId, epoch: int, fingerprint: Fingerprint, metadata: bytes) -> None: ...
    def disconnect(self, peer: WorkerId, epoch: int | None = None) -> None: ...
    def stop(self) -> None: ...
    def join(self, timeout_s: float | None = None) -> bool: ...


BackendFactory = Callable[[WorkerId, int, Sequence[PoolRegion], Fingerprint], TransferBackend]
"""(worker, epoch, regions, fingerprint) -> the backend of that worker; tests join several in one process."""
