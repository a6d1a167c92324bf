"""Prompts are read beside answers only as fast as the answers' targets allow."""

from __future__ import annotations

import dataclasses

from decode.pace import Pace
from decode.run import DecodeRun
from tests.support.runs import run_of


def answer(tpot_target_s: float | None) -> DecodeRun:
    run = run_of([1, 2, 3])
    run.spec = dataclasses.replace(run.spec, tpot_target_s=tpot_target_s)
    return run


def taught() -> Pace:
    """A step of answers takes 20 ms, a prompt token 1 ms more."""
    pace = Pace(budget=512, block_tokens=16)
    pace.stepped(num_answers=4, prompt_tokens=0, seconds=0.020)
    pace.stepped(num_answers=4, prompt_tokens=100, seconds=0.120)
    return pace


def test_without_targets_prompts_have_what_the_answers_leave_of_the_budget() -> None:
    assert taught().prompt_tokens([answer(None)] * 12) == 500
    assert Pace(budget=512, block_tokens=16).prompt_tokens([answer(0.001)]) == 511


def test_the_strictest_target_decides() -> None:
    assert taught().prompt_tokens([answer(None), answer(0.1), answer(0.05)]) == 30


def test_a_block_is_always_read() -> None:
    assert taught().prompt_tokens([answer(0.010)]) == 16
    assert taught().prompt_tokens([answer(None)] * 600) == 16


def test_a_step_without_answers_tells_what_a_prompt_token_takes() -> None:
    pace = Pace(budget=512, block_tokens=16)
    pace.stepped(num_answers=1, prompt_tokens=64, seconds=9.0)  # whose time this was is not known
    pace.stepped(num_answers=0, prompt_tokens=100, seconds=0.1)
    pace.stepped(num_answers=2, prompt_tokens=0, seconds=0.010)
    assert pace.prompt_tokens([answer(0.0605)]) == 50
