"""A standby worker, with the workers' own schedulers: it takes either role, and no request is lost."""

from __future__ import annotations

import random

import pytest

from coordinator.fleet import WorkerState
from coordinator.standby import Standbys
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from tests.support.simulated_cluster import SimulatedCluster
from tests.support.simulated_process import MODEL

STANDBY = WorkerId("decode-1")


class Watched(SimulatedCluster):
    def __init__(self, seed: int) -> None:
        super().__init__(random.Random(seed))
        self.standbys = Standbys({MODEL: 1})

    def live(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.25)):
            for event in self.standbys.ticked(self.registry.fleet, self.now):
                self.tell(event)
            self._move_everything()
            for process in self.processes.values():
                self.do_beat(process)
            self._move_everything()
            self.do_pass_time(0.25)

    def submit(self, count: int) -> None:
        for _ in range(count):
            self.do_submit(12, 4, 1, patience_s=60.0)

    @property
    def standby(self) -> WorkerState:
        found = self.registry.fleet.up(STANDBY)
        assert found is not None
        return found


@pytest.mark.parametrize(("lost", "role"), [("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)])
@pytest.mark.parametrize("seed", range(5))
def test_it_takes_the_role_of_the_lost_one_and_gives_it_back(lost: str, role: Role, seed: int) -> None:
    cluster = Watched(seed)
    cluster.live(1.0)
    assert cluster.standby.draining
    assert cluster.standbys.stands_by(STANDBY)
    cluster.submit(6)
    cluster.end_process(cluster.processes[WorkerId(lost)])
    cluster.live(3.0)
    assert (cluster.standby.info.role, cluster.standby.draining) == (role, False)
    cluster.submit(6)
    cluster.live(3.0)
    cluster.submit(6)
    cluster.start(lost)
    cluster.live(8.0)
    assert (cluster.standby.info.role, cluster.standby.draining) == (Role.DECODE, True)
    assert cluster.standbys.stands_by(STANDBY)
    cluster.settle()
    assert cluster.counts["finished"] == 18
