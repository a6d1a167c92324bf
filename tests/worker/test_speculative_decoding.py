"""Speculation on whole workers changes no token, log-probability or end of an answer, and loses no block."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from pdserve.core.config import CacheSettings, DType, ModelSettings
from pdserve.core.errors import ConfigError
from pdserve.core.messages import Role, Tokens
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import SequenceSlice
from pdserve.engine.build import Engine, build_engine
from tests.support.driver import Answer, Driver
from tests.support.tiny_models import make_tiny_model
from tests.support.token_engine import BLOCK_TOKENS, VOCAB, TokenEngine, reference
from tests.support.workers import DECODE, Pair, config_of, pair_of_workers

BASE = SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True)
PARAMS = {
    "greedy": dataclasses.replace(BASE, temperature=0.0),
    "sampled": BASE,
    "filtered": dataclasses.replace(BASE, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01),
    "penalised": dataclasses.replace(
        BASE,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        logit_bias={5: 3.0, 6: -100.0},
    ),
    "logprobs": dataclasses.replace(BASE, logprobs=3),
    "stop_after_min_tokens": dataclasses.replace(
        BASE, stop_token_ids=tuple(range(0, 60)), min_tokens=9, ignore_eos=False
    ),
}


class Unsure(TokenEngine):
    """The same model, but every third guess is another's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        forward, count = self.runner.forward, iter(range(1_000_000))

        def wrong_sometimes(
            slices: Sequence[SequenceSlice],
            *,
            layer_groups: int = 1,
            on_layers_done: Callable[[int, int], None] | None = None,
        ) -> Tensor:
            logits_NV = forward(slices, layer_groups=layer_groups, on_layers_done=on_layers_done)
            for row in range(len(logits_NV)):
                if next(count) % 3 == 0:
                    logits_NV[row] = -logits_NV[row]
            return logits_NV

        self.runner.forward = wrong_sometimes  # type: ignore[method-assign]  # a test's double


def speculative(method: str, **fields: object) -> dict[str, dict[str, object]]:
    settings = {"method": method, "num_speculative_tokens": 4, "adaptive": False, "prompt_lookup_min": 1}
    if method == "draft_model":
        settings["model"] = "given"
    return {"speculative": {**settings, **fields}}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length}/{seed}").choices(range(VOCAB), k=length)


def answers(
    folder: Path,
    params: Sequence[SamplingParams],
    prompts: Sequence[list[int]],
    *,
    decode_blocks: int = 128,
    draft: TokenEngine | None = None,
    colocated: bool = False,
    **config: dict[str, object],
) -> tuple[list[Answer], Pair]:
    async def play(pair: Pair) -> list[Answer]:
        async with Driver(pair.addresses) as driver:
            specs = [driver.spec(prompt, p) for p, prompt in zip(params, prompts, strict=True)]
            return await asyncio.gather(*[driver.ask(spec, colocated=colocated) for spec in specs])

    def engine(role: Role) -> TokenEngine:
        return TokenEngine(num_blocks=decode_blocks)

    folder.mkdir(exist_ok=True)
    with pair_of_workers(folder, engine, config_of(**config), draft_engine=draft) as pair:
        said = asyncio.run(play(pair))
        pair.wait_until_every_block_is_back()
    return said, pair


def logprobs_of(answer: Answer) -> list[object]:
    return [entry for message in answer.said(Tokens) for entry in message.logprobs]


@pytest.mark.parametrize("colocated", [False, True], ids=["handed_over", "read_here"])
@pytest.mark.parametrize("method", ["draft_model", "ngram"])
def test_answers_are_those_of_plain_decoding(tmp_path: Path, method: str, colocated: bool) -> None:
    params = list(PARAMS.values())
    prompts = [prompt_of(13 + 5 * i, i) for i in range(len(params))]
    plain, _ = answers(tmp_path / "plain", params, prompts, colocated=colocated)
    drafts = TokenEngine(num_blocks=128) if method == "ngram" else Unsure(num_blocks=128)
    guessed, pair = answers(
        tmp_path / "guessed", params, prompts, colocated=colocated, draft=drafts, **speculative(method)
    )
    for name, before, after in zip(PARAMS, plain, guessed, strict=True):
        assert before.failed is after.failed is None
        assert after.tokens == before.tokens, name
        assert after.finish is before.finish
        assert logprobs_of(after) == logprobs_of(before)
    assert plain[0].tokens == reference(prompts[0], params[0], 40)
    if method == "draft_model":
        beat = pair.decode.snapshot()
        assert sum(beat.proposed_at) > sum(beat.accepted_at) > 20
        assert max(len(message.tokens) for answer in guessed for message in answer.said(Tokens)) > 2


def test_a_draft_that_knows_the_target_is_right_every_time_even_where_tokens_are_drawn(
    tmp_path: Path,
) -> None:
    _, pair = answers(
        tmp_path,
        [PARAMS["sampled"], PARAMS["penalised"]],
        [prompt_of(20), prompt_of(9)],
        draft=TokenEngine(),
        **speculative("draft_model"),
    )
    beat = pair.decode.snapshot()
    assert sum(beat.proposed_at) == sum(beat.accepted_at) > 40


def test_preemption_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    params = [dataclasses.replace(BASE, seed=seed, max_tokens=50) for seed in range(6)]
    prompts = [prompt_of(12, seed) for seed in range(6)]
    guessed, pair = answers(
        tmp_path, params, prompts, decode_blocks=40, draft=Unsure(), **speculative("draft_model")
    )
    assert pair.decode.snapshot().preemptions > 0
    for answer, prompt, p in zip(guessed, prompts, params, strict=True):
        assert answer.failed is None
        assert answer.tokens == reference(prompt, p, 50)


def test_a_draft_model_without_room_guesses_at_those_it_has_room_for(tmp_path: Path) -> None:
    draft = TokenEngine(num_blocks=20)
    params = [dataclasses.replace(BASE, seed=seed) for seed in range(4)]
    prompts = [prompt_of(30, seed) for seed in range(4)]
    guessed, pair = answers(tmp_path, params, prompts, draft=draft, **speculative("draft_model"))
    for answer, prompt, p in zip(guessed, prompts, params, strict=True):
        assert answer.tokens == reference(prompt, p, 40)
    assert sum(pair.decode.snapshot().accepted_at) > 0


def test_a_long_prompt_is_read_by_the_draft_model_in_chunks(tmp_path: Path) -> None:
    draft = TokenEngine()
    (answer,), _ = answers(
        tmp_path, [PARAMS["sampled"]], [prompt_of(70)], draft=draft, **speculative("draft_model")
    )
    assert answer.tokens == reference(prompt_of(70), PARAMS["sampled"], 40)
    assert max(tokens for step in draft.runner.steps for _, tokens in step) <= 16


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny = make_tiny_model("llama32_tied_llama3_rope", tmp_path / "tiny")
    engine = build_engine(
        tiny.path,
        ModelSettings(dtype=DType.FLOAT32),
        CacheSettings(block_size=BLOCK_TOKENS, num_blocks=8),
        device="cpu",
        num_threads=1,
    )
    with (
        pytest.raises(ConfigError, match="vocabulary of 160, the target of 97"),
        pair_of_workers(
            tmp_path, lambda role: TokenEngine(), config_of(**speculative("draft_model")), draft_engine=engine
        ),
    ):
        pass


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_a_real_model_in_float32_gives_the_same_tokens(tmp_path: Path, method: str) -> None:
    tiny = make_tiny_model("llama32_tied_llama3_rope", tmp_path / "tiny")

    def engine(role: Role | None = None) -> Engine:
        return build_engine(
            tiny.path,
            ModelSettings(dtype=DType.FLOAT32),
            CacheSettings(block_size=8, num_blocks=64),
            device="cpu",
            num_threads=1,
        )

    params = [
        SamplingParams(temperature=t, seed=3, max_tokens=60, ignore_eos=True) for t in (0.0, 0.7, 0.0, 1.0)
    ]
    prompts = [[7, 8, 9, 10] * 5, [3, 4, 5] * 7, prompt_of(33), prompt_of(17)]

    async def play(pair: Pair) -> list[list[int]]:
        async with Driver(pair.addresses) as driver:
            asked = [driver.generate(prompt, p) for p, prompt in zip(params, prompts, strict=True)]
            return await asyncio.gather(*asked)

    (tmp_path / "a").mkdir()
    with pair_of_workers(tmp_path / "a", engine) as pair:
        plain = asyncio.run(play(pair))
    (tmp_path / "b").mkdir()
    draft = engine() if method == "draft_model" else None
    with pair_of_workers(
        tmp_path / "b", engine, config_of(**speculative(method)), draft_engine=draft
    ) as pair:
        assert asyncio.run(play(pair)) == plain
        pair.wait_until_every_block_is_back()
        assert sum(pair.decode.snapshot().accepted_at) > 3


def test_the_heartbeat_counts_guesses_by_position(tmp_path: Path) -> None:
    _, pair = answers(
        tmp_path, [PARAMS["greedy"]], [prompt_of(20)], draft=Unsure(), **speculative("draft_model")
    )
    beat = pair.decode.snapshot()
    assert beat.worker == DECODE
    assert len(beat.proposed_at) == len(beat.accepted_at) == 4
    assert beat.proposed_at == sorted(beat.proposed_at, reverse=True)
    assert beat.accepted_at == sorted(beat.accepted_at, reverse=True)
    assert all(a <= p for a, p in zip(beat.accepted_at, beat.proposed_at, strict=True))
