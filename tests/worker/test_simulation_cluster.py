"""`make sim`: whole clusters with faults of every kind, each from one seed, with a clock of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from coordinator import fetching
from pdserve.core.ids import WorkerId
from tests.support.paths import REPO
from tests.support.simulated_cluster import SimulatedCluster
from tests.worker.test_simulation import seeds

ROUNDS = int(os.environ.get("PDSERVE_SIM_ROUNDS", "1"))
"""A seed's first rounds are the same however many follow, so a failure of `make test` is found again."""
TURNS = 150


@pytest.mark.parametrize("seed", seeds(1000, 200))
def test_no_request_token_or_block_is_lost_whatever_goes_wrong(seed: int) -> None:
    cluster = SimulatedCluster(random.Random(seed))
    for _ in range(ROUNDS):
        for _ in range(TURNS):
            cluster.turn()
        cluster.settle()
    assert len(cluster.ends) == cluster.counts["submitted"]


def test_a_cluster_where_nothing_goes_wrong_finishes_every_request() -> None:
    cluster = SimulatedCluster(random.Random(1))
    for _ in range(3000):
        cluster.turn(faults=0.0)
    cluster.settle()
    assert cluster.counts["submitted"] > 50
    refused = sum(end == "Overloaded" for end in cluster.ends.values())
    assert cluster.counts["finished"] == cluster.counts["submitted"] - refused


def test_last_words_never_reach_the_successor_of_the_worker_they_are_for() -> None:
    """A prefill worker hears that a coordinator is gone only after the next one has introduced a new decode
    worker: what it then sends about a prompt of before is for a process that has ended."""
    cluster = SimulatedCluster(random.Random(3))
    for name in ("prefill-1", "decode-1"):
        cluster.do_kill(cluster.processes[WorkerId(name)])
        cluster.do_stop(cluster.processes[WorkerId(name)])
    prefill, decode = (cluster.processes[WorkerId(name)] for name in ("prefill-0", "decode-0"))
    while prefill.inbox or prefill.down or decode.inbox or decode.down or prefill.up or decode.up:
        for process in (prefill, decode):
            cluster.do_deliver_down(process)
            cluster.do_inbox(process)
            cluster.do_deliver_up(process)
    cluster.do_submit(num_prompt=12, max_tokens=40, num_samples=1, patience_s=60.0)
    cluster.do_deliver_down(decode)
    while decode.up:
        cluster.do_deliver_up(decode)
    while prefill.down:
        cluster.do_deliver_down(prefill)
    assert not prefill.scheduler.idle, "it has the prompt"
    cluster.do_stop(decode)
    cluster.do_restart_coordinator()
    cluster.do_kill(decode)
    while prefill.down:  # the new coordinator's, before the loss of the old one
        cluster.do_deliver_down(prefill)
    while prefill.inbox:
        cluster.do_inbox(prefill)
    cluster.settle()


def lives(seeds: range) -> str:
    """All that can be told of some short ones."""
    told = []
    for seed in seeds:
        cluster = SimulatedCluster(random.Random(seed))
        for _ in range(400):
            cluster.turn()
        told.append(f"{sorted(cluster.counts.items())} {cluster.output} {cluster.ends} {cluster.now}")
    return "\n".join(told)


def test_one_seed_does_the_same_again_in_another_process() -> None:
    """Whose hashes of names are others: whatever goes by the order of a set would show."""
    again = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import lives; print(lives(range(7, 10)))"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "kernels")]),
            "PYTHONHASHSEED": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    )
    assert again.stdout.strip() == lives(range(7, 10))
    assert "submitted" in again.stdout


FAULTS = {
    *("killed", "stopped", "continued", "connection broken", "coordinator restarted", "drained"),
    *("step failed", "push fails", "push fails halfway", "push fails after landing", "push is lost"),
    *("push timed out", "cancelled", "cut off"),
}


def test_the_faults_that_are_drawn_all_happen() -> None:
    """A simulation in which nothing goes wrong proves nothing.

    What a seed draws depends on all that came before: no fixed number of seeds is sure to hold every fault.
    """
    happened: set[str] = set()
    for seed in range(200):
        cluster = SimulatedCluster(random.Random(seed))
        for _ in range(500):
            cluster.turn(faults=2.0)
        cluster.settle()
        happened |= cluster.counts.keys()
        if happened >= FAULTS:
            return
    raise AssertionError(f"never drawn: {FAULTS - happened}")


def test_beginnings_of_prompts_move_between_workers_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if reading were so slow that every block is worth moving."""
    monkeypatch.setattr(fetching, "time_to_read_s", lambda *_: 10.0)
    monkeypatch.setattr(fetching, "LEAST_BLOCKS", 1)
    counts = Counter[str]()
    for seed in range(20, 32):
        cluster = SimulatedCluster(random.Random(seed))
        for _ in range(300):
            cluster.turn()
        cluster.settle()
        assert len(cluster.ends) == cluster.counts["submitted"]
        assert not cluster.registry.num_fetching
        counts += cluster.counts
    assert counts["prefix fetched"] >= 3
    assert counts["killed"]
