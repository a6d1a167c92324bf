"""How busy a device is: read where it can be, absent where not, never an error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pdserve.core.worker_state import DeviceUsage
from pdserve.worker.device_probe import CpuProbe, no_probe, nvml_probe, probe_of


class NVMLError(Exception):
    pass


class Driver:
    """What is used of `pynvml`."""

    NVMLError = NVMLError

    def __init__(self, *, missing: str = "") -> None:
        self.missing = missing

    def __getattr__(self, name: str) -> object:
        answers: dict[str, object] = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=10, total=80),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=44, memory=1),
            "nvmlDeviceGetPowerUsage": 350_000,
        }

        def call(*_: object) -> object:
            if name == self.missing:
                raise NVMLError(name)
            return answers[name]

        return call


class Process:
    def __init__(self) -> None:
        self.spent = 0.0

    def cpu_times(self) -> SimpleNamespace:
        return SimpleNamespace(user=self.spent, system=0.0)

    def memory_info(self) -> SimpleNamespace:
        return SimpleNamespace(rss=123)


def test_a_gpu_says_how_busy_it_is_in_shares_bytes_and_watts() -> None:
    assert nvml_probe(Driver(), "GPU-1")() == DeviceUsage(
        utilisation=0.44, memory_used_bytes=10, memory_total_bytes=80, power_w=350.0
    )


def test_a_board_that_does_not_tell_its_power_tells_the_rest() -> None:
    usage = nvml_probe(Driver(missing="nvmlDeviceGetPowerUsage"), "GPU-1")()
    assert usage is not None
    assert usage.power_w is None
    assert usage.utilisation == 0.44


@pytest.mark.parametrize("missing", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMemoryInfo"])
def test_a_driver_that_does_not_answer_gives_no_sample(missing: str) -> None:
    assert nvml_probe(Driver(missing=missing), "GPU-1")() is None


def test_a_cpu_worker_is_measured_against_its_own_cores() -> None:
    now, process = [10.0], Process()
    probe = CpuProbe(4, process, lambda: now[0])  # type: ignore[arg-type]  # as much of a process as is used
    now[0], process.spent = 12.0, 4.0
    assert probe().utilisation == pytest.approx(0.5)
    assert probe().utilisation == pytest.approx(0.5)  # no time has passed
    now[0], process.spent = 13.0, 99.0
    assert probe().utilisation == 1.0
    assert probe().memory_used_bytes == 123


def test_this_process_can_be_measured() -> None:
    usage = probe_of(torch.device("cpu"), num_cores=1)()
    assert usage is not None
    assert 0.0 <= usage.utilisation <= 1.0
    assert 0 < usage.memory_used_bytes < usage.memory_total_bytes
    assert no_probe() is None
