"""The embedded default model, float32, through Ray, NIXL and gRPC, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from pdserve.models.store import DEFAULT_MODEL, resolve
from tests.e2e.conftest import config_of
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray, pytest.mark.network_package]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
NEW_TOKENS = 16


@dataclass(frozen=True)
class Reference:
    folder: Path
    model: PreTrainedModel
    chat: list[int]
    text: list[int]

    def prompts(self) -> list[list[int]]:
        """One token, a block less one, a block, several blocks, more than a chunk."""
        return [self.text[:length] for length in (1, 63, 64, 200, 530)]


@pytest.fixture(scope="module")
def reference() -> Reference:
    folder = resolve(DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    text = tokenizer.encode("A river that runs through the old town carries boats to the sea. " * 60)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Reference(folder, model, [int(token) for token in chat], text)


@pytest.fixture(scope="module", params=[1, 0], ids=["disaggregated", "colocated"])
def smollm2(request: pytest.FixtureRequest, reference: Reference) -> Iterator[RunningDeployment]:
    config = config_of(
        reference.folder,
        model={"served_model_name": None},
        cache={"block_size": 64, "num_blocks": 64},
        prefill={"workers": request.param, "max_num_batched_tokens": 256},
    )
    with RunningDeployment(config) as running:
        yield running


def test_greedy_tokens_equal_transformers(smollm2: RunningDeployment, reference: Reference) -> None:
    with smollm2.client() as client:
        for prompt in reference.prompts():
            completion = client.generate(prompt_token_ids=prompt, max_tokens=NEW_TOKENS, temperature=0.0)
            assert list(completion.token_ids) == greedy(reference.model, prompt, NEW_TOKENS), len(prompt)
    smollm2.wait_until("every block back", smollm2.idle)


def test_a_chat_question_is_answered_as_transformers_would(
    smollm2: RunningDeployment, reference: Reference
) -> None:
    with smollm2.client() as client:
        deltas = list(client.stream(messages=QUESTION, max_tokens=NEW_TOKENS, temperature=0.0))
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == greedy(reference.model, reference.chat, NEW_TOKENS)
    assert "Paris" in "".join(delta.text for delta in deltas)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.prompt_tokens == len(reference.chat)
