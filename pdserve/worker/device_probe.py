"""How busy the device of a worker is: NVIDIA's management library for a GPU, the kernel for cores.

Where nothing can be read there is no sample, and no metric; a worker works without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import psutil

from pdserve.core.worker_state import DeviceUsage

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Probe = Callable[[], DeviceUsage | None]
_PERCENT: Final = 100.0
_MILLIWATTS: Final = 1e3


def probe_of(device: torch.device, *, num_cores: int) -> Probe:
    """For the device this process computes on. num_cores: of a worker on a CPU."""
    if device.type == "cpu":
        return CpuProbe(num_cores)
    try:
        import pynvml  # an optional dependency
    except ImportError:
        log.info("nvidia-ml-py is not installed: no metrics of the GPU")
        return no_probe
    return nvml_probe(pynvml, _uuid_of(device))


def no_probe() -> None:
    """Nothing can be read."""


class CpuProbe:
    """Processor time of this process against that of its cores."""

    def __init__(
        self,
        num_cores: int,
        process: psutil.Process | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_cores, self._clock = max(num_cores, 1), clock
        self._process = process or psutil.Process()
        self._total = psutil.virtual_memory().total
        self._at, self._spent = self._read()
        self._utilisation = 0.0

    def __call__(self) -> DeviceUsage:
        at, spent = self._read()
        if at > self._at:
            share = (spent - self._spent) / (at - self._at) / self._num_cores
            self._utilisation, self._at, self._spent = min(share, 1.0), at, spent
        return DeviceUsage(
            utilisation=self._utilisation,
            memory_used_bytes=self._process.memory_info().rss,
            memory_total_bytes=self._total,
        )

    def _read(self) -> tuple[float, float]:
        times = self._process.cpu_times()
        return self._clock(), times.user + times.system


def nvml_probe(nvml: Any, uuid: str) -> Probe:
    """nvml: the module `pynvml`, which has no types. Called from one thread."""
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        log.warning("the driver does not tell how busy the GPU is: %s", error)
        return no_probe

    def probe() -> DeviceUsage | None:
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            return DeviceUsage(
                utilisation=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / _PERCENT,
                memory_used_bytes=memory.used,
                memory_total_bytes=memory.total,
                power_w=_power_w(nvml, handle),
            )
        except nvml.NVMLError:
            return None

    return probe


def _power_w(nvml: Any, handle: Any) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetPowerUsage(handle)) / _MILLIWATTS
    except nvml.NVMLError:  # some boards, and slices of one, do not tell
        return None


def _uuid_of(device: torch.device) -> str:
    import torch  # here, so that what has no GPU need not import it for this

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
