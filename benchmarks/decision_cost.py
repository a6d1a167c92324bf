"""What one placement costs the coordinator, in CPU time: `python -m benchmarks.decision_cost`."""

from __future__ import annotations

import time

from coordinator.fleet import Fleet, WorkerState
from coordinator.router import Router
from coordinator.simulator.profile import GPUS, ModelSize, analytic
from coordinator.simulator.world import MODEL, simulated_info
from coordinator.sla import Goal
from pdserve.core.config import RoutingPolicy
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import Role

SIZES = (10, 100, 1000)
_LLAMA_8B = ModelSize(params=8.03e9, layers=32, heads=32, kv_heads=8, head_dim=128)
_PROMPT = 1000


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


def cost_us(policy: RoutingPolicy, fleet: Fleet, *, rounds: int = 5, calls: int = 100) -> float:
    """Microseconds of CPU of one decision with its forecast, the least of `rounds` means."""
    router, goal = Router(policy, 0), Goal(ttft_s=1.0, tpot_s=0.05, due=100.0)
    least = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(calls):
            placement = router.place(fleet, MODEL, _PROMPT, goal=goal)
            if placement is not None:
                router.forecast(placement)
        least = min(least, (time.process_time() - began) / calls)
    return least * 1e6


def main() -> None:
    print("| policy | " + " | ".join(f"{size} workers" for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    fleets = [fleet_of(size) for size in SIZES]
    for policy in RoutingPolicy:
        costs = " | ".join(f"{cost_us(policy, fleet):.0f} µs" for fleet in fleets)
        print(f"| {policy.value} | {costs} |")


if __name__ == "__main__":
    main()
