"""How many requests per second a fleet serves in time: what the planner compares fleets by.

    prefill   P servers, one queue: as many as leave one in twenty without its TTFT target. The wait is
              Sakasegawa's approximation of M/G/P, its tail exponential.
    decode    the largest batch whose step is within the TPOT target, over what an answer takes in it
    both      the lesser, where decode workers read prompts in the time that they have to spare

Both from the coefficients that the latency models have learned. H. Sakasegawa, "An approximation formula
L = a b^r / (1 - r)", 1977.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from coordinator.fleet import WorkerState
from coordinator.linear_fit import LinearFit
from coordinator.planner.demand import Demand
from coordinator.planner.proposal import Split

KNOWN: Final = 4
"""Observations that a latency model needs before plans are made with it; a worker's profile has as many."""
LATE: Final = 0.05
"""Part of the requests that may miss their TTFT target at a prefill stage's capacity."""
_ROOM: Final = 0.95
"""Of the KV blocks that a batch may take: answers differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Of a worker of each role, in seconds per unit, as `coordinator.latency` has them."""

    prefill: tuple[float, float, float]
    """Per prompt, token, and pair of tokens."""
    decode: tuple[float, float, float]
    """Per step, sequence, and token of context."""
    max_seqs: int
    max_context: int
    """Tokens whose KV fits."""
    prefill_error: float = 0.0
    decode_error: float = 0.0
    """Relative errors of late."""

    def scaled(self, prefill: float, decode: float) -> Speeds:
        """A worker whose times are these multiples."""
        one, two = self.prefill, self.decode
        return replace(
            self,
            prefill=(one[0] * prefill, one[1] * prefill, one[2] * prefill),
            decode=(two[0] * decode, two[1] * decode, two[2] * decode),
        )


def learned(workers: Iterable[WorkerState]) -> Speeds | None:
    """Means over the workers that know; None while nobody knows of one of the roles.

    A worker keeps what it learned in another role, so that a fleet knows both.
    """
    states = list(workers)
    prefill = _mean([s.latency.prefill for s in states])
    decode = _mean([s.latency.decode for s in states])
    if prefill is None or decode is None:
        return None
    return Speeds(
        prefill=prefill[0],
        decode=decode[0],
        max_seqs=min(s.info.max_num_seqs for s in states),
        max_context=min(s.info.num_blocks * s.info.block_tokens for s in states),
        prefill_error=prefill[1],
        decode_error=decode[1],
    )


def _mean(fits: list[LinearFit]) -> tuple[tuple[float, float, float], float] | None:
    known = [fit for fit in fits if fit.count >= KNOWN]
    if not known:
        return None
    sums = [sum(fit.coefficients[i] for fit in known) / len(known) for i in range(3)]
    return (sums[0], sums[1], sums[2]), sum(fit.error for fit in known) / len(known)


def prefill_capacity(speeds: Speeds, workers: int, demand: Demand) -> float:
    """Requests per second whose first tokens come in time, all but `LATE` of them."""
    mean_s, cv2 = _service(speeds, demand)
    if workers < 1 or mean_s <= 0:
        return 0.0
    slack_s = demand.ttft_s - mean_s
    if slack_s <= 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(30):
        load = (low + high) / 2
        if _late(load, workers, mean_s, cv2, slack_s) <= LATE:
            low = load
        else:
            high = load
    return low * workers / mean_s


def _service(speeds: Speeds, demand: Demand) -> tuple[float, float]:
    """(Mean, squared coefficient of variation) of the time that reading a prompt takes."""
    per_prompt, per_token, per_pair = speeds.prefill
    mean_s = per_prompt + per_token * demand.prompt + per_pair * demand.prompt_square / 2
    slope = per_token + per_pair * demand.prompt
    variance = slope * slope * max(demand.prompt_square - demand.prompt**2, 0.0)
    return mean_s, variance / (mean_s * mean_s) if mean_s else 0.0


def _late(load: float, workers: int, mean_s: float, cv2: float, slack_s: float) -> float:
    """Part of the requests that wait longer than `slack_s`, at this utilisation."""
    if load >= 1 or math.isinf(slack_s):
        return 1.0 if load >= 1 else 0.0
    waits: float = load ** (math.sqrt(2 * (workers + 1)) - 1)
    wait_s = (1 + cv2) / 2 * waits / (workers * (1 - load)) * mean_s
    if wait_s <= 0:
        return 0.0
    return waits * math.exp(-slack_s * waits / wait_s)


def decode_capacity(speeds: Speeds, workers: int, demand: Demand) -> float:
    """Requests per second whose answers are written in time."""
    batch = largest_batch(speeds, demand)
    if batch < 1:
        return 0.0
    return workers * batch / (demand.answer * _step_s(speeds, batch, demand))


def largest_batch(speeds: Speeds, demand: Demand) -> float:
    """Sequences of one worker whose steps are within the TPOT target, and whose KV fits; 0: not even one."""
    context = demand.context + demand.answer / 2
    most = min(float(speeds.max_seqs), _ROOM * speeds.max_context / context)
    if most < 1 or _step_s(speeds, 1, demand) > demand.tpot_s:
        return 0.0

    def fits(batch: float) -> bool:
        # Batches vary about their mean as independent arrivals do, and a target is to hold for most of them.
        return _step_s(speeds, batch + math.sqrt(batch), demand) <= demand.tpot_s

    if fits(most):
        return most
    low, high = 1.0, most
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _step_s(speeds: Speeds, batch: float, demand: Demand) -> float:
    fixed, per_seq, per_token = speeds.decode
    return fixed + batch * (per_seq + per_token * (demand.context + demand.answer / 2))


class Capacities:
    """Requests per second that fleets serve in time, of any split: `Capacities(...).of(split)`."""

    def __init__(self, speeds: Speeds, demand: Demand, local_share: float) -> None:
        """local_share: of the time that decode workers have to spare, the part in which they read prompts; 0
        where they never do."""
        self._speeds, self._demand, self._local_share = speeds, demand, local_share
        self._written = decode_capacity(speeds, 1, demand)
        self._mean_s, _ = _service(speeds, demand)
        self._read: dict[int, float] = {}

    def read(self, workers: int) -> float:
        """By so many prefill workers."""
        if workers not in self._read:
            self._read[workers] = prefill_capacity(self._speeds, workers, self._demand)
        return self._read[workers]

    def written(self, workers: int) -> float:
        """By so many decode workers."""
        return workers * self._written

    def of(self, split: Split) -> float:
        """With x requests per second, 1 - x / written of the decode workers' time is to spare."""
        read, written = self.read(split.prefill), self.written(split.decode)
        if not self._local_share or not written or self._mean_s >= self._demand.ttft_s:
            return min(read, written)
        spare = split.decode * self._local_share / self._mean_s
        return min(written, (read + spare) / (1 + spare / written))


def fleet_capacity(speeds: Speeds, split: Split, demand: Demand, local_share: float) -> float:
    """Of one split, as `Capacities` has it."""
    return Capacities(speeds, demand, local_share).of(split)
