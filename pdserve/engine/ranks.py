"""`Ranks` over torch.distributed's process groups, made directly: nothing global, so that a process may hold
several.

gloo on CPUs, over loopback: the ranks of a worker share a machine. NCCL on GPUs for what is summed and
gathered, with gloo beside it for what the CPUs agree on.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from pdserve.core.errors import ConfigError, WorkerLost

T = TypeVar("T")

LARGE_NUMBERS: Final = 2**16
"""From here on every rank adds a part of the numbers and hands it round, instead of adding all of them."""


def meeting_place(path: Path, size: int) -> Store:
    """Where the ranks of a worker find one another: a file that all of them see."""
    store: Store = dist.FileStore(str(path), size)  # type: ignore[attr-defined]  # the stubs lack it
    return store


class GlooRanks:
    """See `Ranks`. Made on every rank; used by one thread of each."""

    def __init__(self, name: str, store: Store, rank: int, size: int, timeout_s: float) -> None:
        """name: the worker's, for errors. timeout_s: after which a rank that does not come is lost.

        Raises `WorkerLost` when not all ranks come.
        """
        if not dist.is_gloo_available():
            raise ConfigError("this build of torch has no gloo: tensor_parallel_size must be 1")
        self._name, self.rank, self.size = name, rank, size
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs have none of this
        options = gloo._Options()
        options._devices = [gloo.create_device(interface="lo")]
        options._timeout = datetime.timedelta(seconds=timeout_s)
        self._group: Any = self._attempt(lambda: gloo(store, rank, size, options))

    def sum(self, x: Tensor) -> Tensor:
        flat = x.contiguous().view(-1)
        if flat.numel() == 0:
            return x
        if self.size == 2 or flat.numel() < LARGE_NUMBERS:
            return _added(self._all(flat)).view(x.shape)
        return self._sum_large(flat).view(x.shape)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        options = dist.GatherOptions()
        options.rootRank = 0
        into = [[torch.empty_like(x) for _ in range(self.size)]] if self.rank == 0 else []
        self._wait(lambda: self._group.gather(into, [x], options))
        return into[0] if into else None

    def from_first(self, x: Tensor) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._wait(lambda: self._group.broadcast([x], options))
        return x

    def smallest(self, value: int) -> int:
        return min(int(part) for part in self._all(torch.tensor([value])))

    def barrier(self) -> None:
        self._wait(lambda: self._group.barrier())

    def _all(self, flat: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        self._wait(lambda: self._group.allgather([parts], [flat]))
        return parts

    def _sum_large(self, flat: Tensor) -> Tensor:
        """Each rank adds a part, in the same order of ranks, and all of them get all parts."""
        count = flat.numel()
        each = -(-count // self.size)
        sent = torch.nn.functional.pad(flat, (0, each * self.size - count))
        received = torch.empty_like(sent)
        self._wait(lambda: self._group.alltoall_base(received, sent, [], []))
        part = _added(list(received.view(self.size, each).unbind()))
        self._wait(lambda: self._group._allgather_base(sent, part))
        return sent[:count]

    def _wait(self, start: Callable[[], Any]) -> None:
        self._attempt(lambda: start().wait())

    def _attempt(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except (RuntimeError, dist.DistError) as error:
            raise WorkerLost(
                self._name, f"its ranks do not answer one another: {_first_line(error)}"
            ) from error


class NcclRanks:
    """See `Ranks`; tensors on this process's GPU."""

    def __init__(self, name: str, store: Store, rank: int, size: int, timeout_s: float) -> None:
        if not dist.is_nccl_available():
            raise ConfigError("this build of torch has no NCCL: tensor_parallel_size must be 1 on a GPU")
        self._name, self.rank, self.size = name, rank, size
        self._cpu = GlooRanks(name, PrefixStore("cpu", store), rank, size, timeout_s)
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = datetime.timedelta(seconds=timeout_s)
        self._group: Any = dist.ProcessGroupNCCL(PrefixStore("gpu", store), rank, size, options)

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.numel():
            self._wait(lambda: self._group.allreduce([x]))
        return x

    def gather(self, x: Tensor) -> list[Tensor] | None:
        into = x.new_empty((self.size, *x.shape))
        self._wait(lambda: self._group._allgather_base(into, x))
        return list(into.unbind()) if self.rank == 0 else None

    def from_first(self, x: Tensor) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._wait(lambda: self._group.broadcast([x], options))
        return x

    def smallest(self, value: int) -> int:
        return self._cpu.smallest(value)

    def barrier(self) -> None:
        self._cpu.barrier()

    def _wait(self, start: Callable[[], Any]) -> None:
        try:
            start().wait()  # the stream waits, not this thread
        except (RuntimeError, dist.DistError) as error:
            raise WorkerLost(
                self._name, f"its ranks do not answer one another: {_first_line(error)}"
            ) from error


def _added(parts: list[Tensor]) -> Tensor:
    """Left to right: floating-point sums depend on the order."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
