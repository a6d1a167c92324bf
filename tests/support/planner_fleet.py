"""A fleet whose workers have learned how fast they are."""

from __future__ import annotations

from coordinator.fleet import Fleet, WorkerState
from coordinator.latency import Work
from coordinator.simulator.profile import Profile
from coordinator.simulator.world import MODEL, simulated_info
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role

PROFILE = Profile(
    prefill_step=1e-4,
    prefill_token=1e-4,
    prefill_pair=1e-12,
    decode_step=0.01,
    decode_seq=1e-4,
    decode_context=1e-12,
    transfer_latency=1e-3,
    transfer_bytes_per_s=1e10,
    kv_token_bytes=1000,
    num_blocks=10_000,
)


def fleet_of(prefill: int, decode: int) -> Fleet:
    """Workers that have learned the profile's speeds."""
    fleet = Fleet()
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for index in range(count):
            info = simulated_info(WorkerId(f"{role.value}-{index}"), role, 1, PROFILE)
            state = WorkerState(info=info, model=MODEL)
            for n in range(1, 30):
                if role is Role.PREFILL:
                    work = Work.of(0, 100 * n, ends=True)
                    state.latency.prefill.learn(work.features, PROFILE.prefill_s(work.tokens, work.pairs))
                else:
                    state.latency.decode.learn((1, n, 1000 * n), PROFILE.step_s(n, 1000 * n))
            fleet.add(state)
    return fleet
