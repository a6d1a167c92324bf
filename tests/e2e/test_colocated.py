"""`--prefill 0`: the decode worker reads prompts itself, and writes the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = pytest.mark.ray

Oracle = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="module")
def colocated(tiny_oracle: Oracle) -> Iterator[RunningDeployment]:
    with RunningDeployment(config_of(tiny_oracle[0], prefill={"workers": 0})) as running:
        yield running


@pytest.mark.parametrize("length", [1, 16, 65, 1000])
def test_greedy_tokens_equal_transformers(
    colocated: RunningDeployment, tiny_oracle: Oracle, length: int
) -> None:
    prompt = prompt_of(length)
    with colocated.client() as client:
        completion = client.generate(prompt_token_ids=prompt, max_tokens=24, temperature=0.0)
    assert list(completion.token_ids) == greedy(tiny_oracle[1], prompt, 24)
    assert completion.timings.prefill_worker == ""
    assert completion.timings.bytes_moved == 0
    colocated.wait_until("every block back", colocated.idle)
