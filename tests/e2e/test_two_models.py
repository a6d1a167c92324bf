"""Two models from one configuration: really started, each with its own workers and answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdserve.core.config import ServeConfig
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.support.whole_cluster import RunningDeployment, greedy, make_tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_two_models_answer_from_one_endpoint_each_with_its_own_weights(
    tiny_oracle: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    other = make_tiny_checkpoint(tmp_path, seed=6)
    base = config_of(tiny_oracle[0], cluster={"cpus_per_worker": 1}).model_dump(mode="json")
    base["model"] = {"dtype": "float32"}
    base["models"] = [
        {"model": str(tiny_oracle[0]), "served_model_name": ["first", "eins"], "prefill": {"workers": 0}},
        {"model": str(tmp_path), "served_model_name": "second"},
    ]
    prompt = prompt_of(40)
    config = ServeConfig.model_validate(base)
    with RunningDeployment(config) as running, running.client() as client:
        for name, oracle in (("eins", tiny_oracle[1]), ("second", other)):
            answer = client.generate(prompt_token_ids=prompt, model=name, max_tokens=12, temperature=0.0)
            assert list(answer.token_ids) == greedy(oracle, prompt, 12)
        assert {m.name: m.decode_workers for m in client.list_models()} == {"first": 1, "second": 1}
        assert answer.timings.prefill_worker == "prefill-0"
        assert greedy(tiny_oracle[1], prompt, 12) != greedy(other, prompt, 12)
