"""Every fault in every phase of a request, and then faults drawn from a seed: `make chaos SEED=n ROUNDS=m`.

One after another on one deployment. Each round: requests in several phases, a fault on one process, and the
proof that it happened. Then: every stream has the right tokens or a typed error after a right beginning,
every block is back, the worker is there again, and the next request works.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedModel

from coordinator.events import Action, Event
from pdserve.core.lifecycle import Phase
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming, epoch_of, require_gone
from tests.support.strikes import has_entered
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Oracle = tuple[Path, PreTrainedModel]
SEED = int(os.environ.get("PDSERVE_CHAOS_SEED", "0"))
ROUNDS = int(os.environ.get("PDSERVE_CHAOS_ROUNDS", "4"))
WORKERS = ("prefill-0", "decode-0", "decode-1")
kill, terminate, stop = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
stop_and_continue = signal.SIGTSTP
"""Continued before anyone may have missed it: the same process goes on. Sent as SIGSTOP."""
FAULTS = {"SIGKILL": kill, "SIGTERM": terminate, "SIGSTOP": stop, "SIGSTOP and SIGCONT": stop_and_continue}
PHASES = (Phase.QUEUED, Phase.PREFILLING, Phase.TRANSFERRING, Phase.DECODING)
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def chaotic(tiny_oracle: Oracle) -> Iterator[RunningDeployment]:
    # Every prompt is read by one worker and written by another, or there would be no transfer to strike in.
    routing = {"max_attempts": 5, "local_prefill": "never", "whole_on_prefill": "never"}
    config = config_of(tiny_oracle[0], decode={"workers": 2}, coordinator=routing)
    with RunningDeployment(config) as running:
        yield running


@pytest.mark.parametrize("phase", [str(phase) for phase in PHASES])
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM", "SIGSTOP", "SIGSTOP and SIGCONT"])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_any_worker_struck_in_any_phase_costs_a_pause_or_a_typed_error(
    chaotic: RunningDeployment, tiny_oracle: Oracle, victim: str, fault: str, phase: str
) -> None:
    """Each of them: what is drawn could leave one out."""
    rng = random.Random(f"{victim}/{fault}/{phase}")
    strike_and_recover(chaotic, tiny_oracle, rng, victim, FAULTS[fault], Phase(phase))


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_drawn_fault_costs_a_pause_or_a_typed_error_and_nothing_else(
    chaotic: RunningDeployment, tiny_oracle: Oracle, round_: int
) -> None:
    rng = random.Random(f"{SEED}/{round_}")
    victim, fault, phase = rng.choice(WORKERS), rng.choice(list(FAULTS.values())), rng.choice(PHASES)
    strike_and_recover(chaotic, tiny_oracle, rng, victim, fault, phase)


def strike_and_recover(
    chaotic: RunningDeployment,
    tiny_oracle: Oracle,
    rng: random.Random,
    victim: str,
    fault: signal.Signals,
    phase: Phase,
) -> None:
    pid, epoch = chaotic.pid(victim), epoch_of(chaotic, victim)
    struck = strike_in(chaotic, phase, pid, fault)
    lengths = [rng.choice([1, 15, 16, 17, 100]) for _ in range(3)] + [1900]
    prompts = [prompt_of(length, seed=rng.randrange(1000)) for length in lengths]
    streams = [Streaming(chaotic, prompt, NUM_TOKENS) for prompt in prompts]
    chaotic.wait_until(f"a request was {phase} when it struck", struck.is_set)
    if fault in (stop, stop_and_continue):
        chaotic.wait_until("it stands still", lambda: is_stopped_or_gone(pid))
    replaced = fault is not stop_and_continue
    if fault is stop_and_continue:
        os.kill(pid, signal.SIGCONT)
        chaotic.wait_until("it runs again", lambda: psutil.Process(pid).status() != psutil.STATUS_STOPPED)
    for stream, prompt in zip(streams, prompts, strict=True):
        stream.end()
        expected = greedy(tiny_oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
        assert stream.tokens == expected[: len(stream.tokens)]
        if stream.error is None:
            assert len(stream.tokens) == NUM_TOKENS
        else:
            assert stream.error.code in ("UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED")

    def back() -> bool:
        state = chaotic.worker(victim)
        return state is not None and state.up and (state.epoch > epoch or not replaced)

    chaotic.wait_until(f"{victim} is back", back, timeout_s=120.0)  # what a start may take
    if replaced:
        require_gone(pid)
    with chaotic.client() as client:
        completion = client.generate(prompt_token_ids=prompt_of(50), max_tokens=8, temperature=0.0)
    assert list(completion.token_ids) == greedy(tiny_oracle[1], prompt_of(50), 8)
    chaotic.wait_until("every block back", chaotic.idle)


def strike_in(running: RunningDeployment, phase: Phase, pid: int, fault: signal.Signals) -> threading.Event:
    """Send the signal from the coordinator's own loop, in the event that brings a request into `phase`.

    Phases can last less than a millisecond: looking from outside would miss them.
    """
    struck = threading.Event()

    def install() -> None:
        dispatcher = running.deployment.coordinator._require_running().dispatcher
        registry = dispatcher.registry
        handle = registry.handle

        def handle_and_strike(event: Event, now: float) -> list[Action]:
            actions = handle(event, now)
            if not struck.is_set() and has_entered(registry, phase):
                os.kill(pid, signal.SIGSTOP if fault is stop_and_continue else fault)
                struck.set()
                registry.handle = handle  # type: ignore[method-assign]  # as it was
            return actions

        registry.handle = handle_and_strike  # type: ignore[method-assign]  # for one strike

    running.on_loop(install)
    return struck


def is_stopped_or_gone(pid: int) -> bool:
    """Gone: it stood still until it was ended and replaced."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
