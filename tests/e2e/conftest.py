"""One deployment per kind for all end-to-end tests: starting Ray and two workers takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from pdserve.core.config import ServeConfig
from tests.support.whole_cluster import RunningDeployment, make_tiny_checkpoint


def config_of(path: Path, /, **sections: dict[str, Any]) -> ServeConfig:
    """A small deployment on a free port, without dashboard."""
    base: dict[str, dict[str, Any]] = {
        "model": {"model": str(path), "served_model_name": "tiny", "dtype": "float32"},
        "cache": {"block_size": 16, "num_blocks": 512},
        "prefill": {"max_num_batched_tokens": 64},
        # So small a model is cheaper where no KV moves: what is tested here would not happen.
        "coordinator": {
            "port": 0,
            "heartbeat_timeout_s": 4.0,
            "local_prefill": "never",
            "whole_on_prefill": "never",
        },
        "cluster": {"dashboard": False, "heartbeat_s": 0.1, "start_timeout_s": 120, "linger_s": 0},
    }
    merged = {
        name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()
    }
    return ServeConfig.model_validate(merged)


@pytest.fixture(scope="session")
def tiny_oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("tiny-e2e")
    return folder, make_tiny_checkpoint(folder)


@pytest.fixture(scope="module")
def tiny(tiny_oracle: tuple[Path, PreTrainedModel]) -> Iterator[RunningDeployment]:
    with RunningDeployment(config_of(tiny_oracle[0])) as running:
        yield running


@pytest.fixture
def conserved(tiny: RunningDeployment) -> Iterator[None]:
    """Whatever the test did: afterwards nothing lives and every block is back."""
    yield
    tiny.wait_until("every block back", tiny.idle)
