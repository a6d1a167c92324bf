"""Where kernel tests run: under Triton's interpreter on the CPU, or for real on a CUDA device.

`TRITON_INTERPRET=1 pytest tests/kernels` interprets; Triton reads the variable when it is first imported, so
it has to be in the environment of the process. `pytest -m gpu tests/kernels` without it uses the device.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests import markers
from tests.support.kernels import poisoned_empty

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=markers.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a kernel test; skips what this process cannot run."""
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("needs TRITON_INTERPRET=1 in the environment; `make test` sets it")
        return "cpu"
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and no TRITON_INTERPRET")
    return "cuda"


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if request.param == torch.bfloat16 and device == "cpu":
        pytest.skip(
            "the interpreter truncates to bfloat16 and multiplies it wrongly: a device alone proves it"
        )
    found: torch.dtype = request.param
    return found


@pytest.fixture(autouse=True)
def _random_inputs_and_poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(20)
    monkeypatch.setattr(torch, "empty", poisoned_empty(torch.empty))
