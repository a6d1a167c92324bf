"""Two models from one configuration: really started, each with its own workers, answers and room."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdserve.client.admin import explain
from pdserve.core.config import ServeConfig
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.support.whole_cluster import RunningDeployment, greedy, make_tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Oracles = dict[str, PreTrainedModel]


@pytest.fixture(scope="module")
def oracles(
    tiny_oracle: tuple[Path, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], Oracles]:
    other = tmp_path_factory.mktemp("other")
    paths = {"first": tiny_oracle[0], "second": other}
    return paths, {"first": tiny_oracle[1], "second": make_tiny_checkpoint(other, seed=6)}


@pytest.fixture(scope="module")
def two(oracles: tuple[dict[str, Path], Oracles]) -> Iterator[RunningDeployment]:
    """`first` (also `eins`) reads and writes on one worker; `second` writes one answer at a time."""
    paths = oracles[0]
    tree = config_of(paths["first"], cluster={"cpus_per_worker": 1}).model_dump(mode="json")
    tree["model"] = {"dtype": "float32"}
    tree["models"] = [
        {"model": str(paths["first"]), "served_model_name": ["first", "eins"], "prefill": {"workers": 0}},
        {"model": str(paths["second"]), "served_model_name": "second", "decode": {"max_num_seqs": 1}},
    ]
    with RunningDeployment(ServeConfig.model_validate(tree)) as running:
        yield running


def test_two_models_answer_from_one_endpoint_each_with_its_own_weights(
    two: RunningDeployment, oracles: tuple[dict[str, Path], Oracles]
) -> None:
    prompt = prompt_of(40)
    expected = {name: greedy(oracle, prompt, 12) for name, oracle in oracles[1].items()}
    assert expected["first"] != expected["second"]
    with two.client() as client:
        for asked, name in (("eins", "first"), ("second", "second")):
            answer = client.generate(prompt_token_ids=prompt, model=asked, max_tokens=12, temperature=0.0)
            assert list(answer.token_ids) == expected[name]
            assert answer.model == name
        assert {m.name: m.decode_workers for m in client.list_models()} == {"first": 1, "second": 1}
        assert answer.timings.prefill_worker == "prefill-0"


class Writing(threading.Thread):
    """A batch answer, read in a thread of its own."""

    def __init__(self, running: RunningDeployment, name: str, prompt: list[int], tokens: int) -> None:
        super().__init__()
        self.running, self.request, self.prompt, self.wanted = running, name, prompt, tokens
        self.begun = threading.Event()
        self.tokens: list[int] = []
        self.preemptions = -1
        self.start()

    def run(self) -> None:
        with self.running.client() as client:
            for delta in client.stream(
                prompt_token_ids=self.prompt,
                model="second",
                max_tokens=self.wanted,
                temperature=0.0,
                ignore_eos=True,
                sla_class="batch",
                request_id=self.request,
            ):
                self.tokens.extend(delta.token_ids)
                self.begun.set()
                if delta.timings is not None:
                    self.preemptions = delta.timings.preemptions


def test_batch_answers_give_way_to_an_urgent_one_and_end_with_the_same_tokens(
    two: RunningDeployment, oracles: tuple[dict[str, Path], Oracles]
) -> None:
    # One writes, and one waits for its seat: the worker takes no third.
    batch = [Writing(two, f"batch-{i}", prompt_of(100, seed=i), 400) for i in range(2)]
    assert all(one.begun.wait(60) for one in batch)
    short = prompt_of(30, seed=7)
    with two.client() as client:
        urgent = client.generate(
            prompt_token_ids=short, model="second", max_tokens=8, temperature=0.0, ttft_target_ms=20.0
        )
    still_writing = any(one.is_alive() for one in batch)
    for one in batch:
        one.join(120)
    assert still_writing, "the urgent answer waited for all of the others"
    assert list(urgent.token_ids) == greedy(oracles[1]["second"], short, 8)
    assert sum(one.preemptions for one in batch) >= 1
    for one in batch:
        assert one.tokens == greedy(oracles[1]["second"], one.prompt, one.wanted, ignore_eos=True)
    notes = [note.text for one in batch for note in explain(two.deployment.grpc, one.request).notes]
    assert any("it gave way to a more urgent request" in text for text in notes)
    two.wait_until("every block back", two.idle)
