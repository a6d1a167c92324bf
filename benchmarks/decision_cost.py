"""What one placement costs the coordinator, in CPU time: `python -m benchmarks.decision_cost`."""

from __future__ import annotations

import argparse
import random
import time

from coordinator.fleet import Fleet, WorkerState
from coordinator.prefix_index import PrefixIndex
from coordinator.router import Router
from coordinator.simulator.profile import GPUS, ModelSize, analytic
from coordinator.simulator.world import MODEL, simulated_info
from coordinator.sla import Goal
from pdserve.core.config import RoutingPolicy
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import Role

SIZES = (10, 100, 1000)
_LLAMA_8B = ModelSize(params=8.03e9, layers=32, heads=32, kv_heads=8, head_dim=128)
_PROMPT = 2500
_BLOCK_TOKENS = 64
_BLOCKS = 32
"""Of a prompt, after the beginning that all have in common."""
_COMMON_BLOCKS = 6


def fleet_of(num_workers: int) -> Fleet:
    """Half of them prefill, with up to seven prompts or sequences each."""
    fleet, profile = Fleet(), analytic(_LLAMA_8B, GPUS["h100"])
    for index in range(num_workers):
        role = Role.DECODE if index % 2 else Role.PREFILL
        info = simulated_info(WorkerId(f"{role.value}-{index:05}"), role, 1, profile)
        state = WorkerState(info=info, model=MODEL)
        for number in range(index % 8):
            attempt = AttemptId(RequestId(f"r{index}.{number}"), 0)
            if role is Role.PREFILL:
                state.place_prefill(attempt, _PROMPT)
            else:
                state.place_decode(attempt, _PROMPT)
        fleet.add(state)
    return fleet


class Prefixes:
    """An index of the largest fleet's prefix caches: conversations with a common beginning."""

    def __init__(self, fleet: Fleet, num_blocks: int) -> None:
        self._rng = random.Random(0)
        self.index = PrefixIndex()
        self._common = [self._rng.getrandbits(64) for _ in range(_COMMON_BLOCKS)]
        self._conversations: list[list[int]] = []
        workers = list(fleet)
        each = num_blocks // len(workers)
        for worker in workers:
            own = [self._rng.getrandbits(64) for _ in range(each - _COMMON_BLOCKS)]
            self._conversations += [own[at : at + _BLOCKS] for at in range(0, 4 * _BLOCKS, _BLOCKS)]
            self.index.heard(worker.id, 0, self._common + own, [], snapshot=True)

    def prompt(self) -> list[int]:
        """Keys of a prompt: the common beginning, a conversation that is known, and something new."""
        known = self._rng.choice(self._conversations)[: self._rng.randrange(_BLOCKS)]
        new = [self._rng.getrandbits(64) for _ in range(_BLOCKS - len(known))]
        return [*self._common, *known, *new]


def cost_us(
    policy: RoutingPolicy,
    fleet: Fleet,
    prefixes: Prefixes | None = None,
    *,
    rounds: int = 5,
    calls: int = 100,
) -> float:
    """Microseconds of CPU of one decision with its forecast, the least of `rounds` means."""
    router, goal = Router(policy, 0), Goal(ttft_s=1.0, tpot_s=0.05, due=100.0)
    least = float("inf")
    for _ in range(rounds):
        prompts = [[] if prefixes is None else prefixes.prompt() for _ in range(calls)]
        began = time.process_time()
        for keys in prompts:
            hits = {} if prefixes is None else prefixes.index.hits(keys)
            cached = {worker: blocks * _BLOCK_TOKENS for worker, blocks in hits.items()}
            placement = router.place(fleet, MODEL, _PROMPT, goal=goal, cached=cached)
            if placement is not None:
                router.forecast(placement)
        least = min(least, (time.process_time() - began) / calls)
    return least * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decision_cost", description=__doc__)
    parser.add_argument(
        "--blocks", type=int, default=10_000_000, help="in the prefix index of the last column"
    )
    blocks = parser.parse_args().blocks
    fleets = [fleet_of(size) for size in SIZES]
    began = time.process_time()
    prefixes = Prefixes(fleets[-1], blocks)
    spent_us = (time.process_time() - began) / prefixes.index.num_blocks * 1e6
    size_bytes, count = prefixes.index.size_bytes, prefixes.index.num_blocks
    print(f"prefix index: {count} blocks in {size_bytes / 1e6:.0f} MB of tables;", end=" ")
    print(f"{size_bytes / count:.1f} bytes each, and {spent_us:.1f} µs to take it in\n")
    sizes = [f"{size} workers" for size in SIZES]
    print("| policy | " + " | ".join([*sizes, f"{SIZES[-1]} workers and the index"]) + " |")
    print("|---|" + "---|" * (len(SIZES) + 1))
    for policy in RoutingPolicy:
        costs = [cost_us(policy, fleet) for fleet in fleets]
        costs.append(cost_us(policy, fleets[-1], prefixes))
        print(f"| {policy.value} | " + " | ".join(f"{cost:.0f} µs" for cost in costs) + " |")


if __name__ == "__main__":
    main()
