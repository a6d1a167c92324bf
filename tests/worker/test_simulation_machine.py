"""Pool, leases and transfers of whole workers, in every order that hypothesis can think of.

A failing order is printed as the steps that lead to it, made as short as possible. The orders of one seed
are the same every time; the test's name holds it.
"""

from __future__ import annotations

import random

import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.support.simulated_cluster import ROLES, SimulatedCluster
from tests.support.simulated_process import Process
from tests.worker.test_simulation import seeds

WHO = st.sampled_from(sorted(ROLES))
INDEX = st.integers(0, 7)


class ClusterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cluster = SimulatedCluster(random.Random(0))

    def _process(self, name: str) -> Process:
        return next(p for p in self.cluster.processes.values() if p.id == name)

    @rule(
        num_prompt=st.integers(1, 28),
        max_tokens=st.integers(1, 12),
        num_samples=st.integers(1, 3),
        patience_s=st.sampled_from([0.5, 60.0]),
    )
    def submit(self, num_prompt: int, max_tokens: int, num_samples: int, patience_s: float) -> None:
        self.cluster.do_submit(num_prompt, max_tokens, num_samples, patience_s)

    @rule(who=WHO, count=st.integers(1, 6))
    def messages_arrive(self, who: str, count: int) -> None:
        for _ in range(count):
            self.cluster.do_deliver_down(self._process(who))
            self.cluster.do_deliver_up(self._process(who))

    @rule(who=WHO)
    def commands_arrive(self, who: str) -> None:
        self.cluster.do_deliver_down(self._process(who))

    @rule(who=WHO)
    def answers_arrive(self, who: str) -> None:
        self.cluster.do_deliver_up(self._process(who))

    @rule(who=WHO, fails=st.sampled_from([False, False, False, True]))
    def compute(self, who: str, fails: bool) -> None:
        self.cluster.do_step(self._process(who), fails=fails)

    @rule(
        index=INDEX,
        how=st.sampled_from(["lands", "fails", "fails halfway", "fails after landing", "is lost"]),
    )
    def a_push_ends(self, index: int, how: str) -> None:
        self.cluster.do_end_push(index, how)

    @rule(index=INDEX, again=st.booleans())
    def a_note_arrives(self, index: int, again: bool) -> None:
        self.cluster.do_note(index, again=again)

    @rule(who=WHO)
    def a_transfer_event_is_heard(self, who: str) -> None:
        self.cluster.do_inbox(self._process(who))

    @rule(who=WHO)
    def beat(self, who: str) -> None:
        self.cluster.do_beat(self._process(who))

    @rule(seconds=st.sampled_from([0.01, 0.3, 3.5, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.do_pass_time(seconds)

    @rule()
    def a_client_leaves(self) -> None:
        self.cluster.do_cancel()

    @rule(who=WHO)
    def kill(self, who: str) -> None:
        self.cluster.do_kill(self._process(who))

    @rule(who=WHO)
    def stop(self, who: str) -> None:
        self.cluster.do_stop(self._process(who))

    @rule(who=WHO)
    def go_on(self, who: str) -> None:
        self.cluster.do_continue(self._process(who))

    @rule(who=WHO)
    def a_connection_breaks(self, who: str) -> None:
        self.cluster.do_break_connection(self._process(who))

    @rule()
    def the_coordinator_is_killed(self) -> None:
        self.cluster.do_restart_coordinator()

    @rule(who=WHO, into_use=st.booleans())
    def drain(self, who: str, into_use: bool) -> None:
        process = self._process(who)
        if into_use:
            self.cluster.do_undrain(process)
        else:
            self.cluster.do_drain(process)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        for process in self.cluster.processes.values():
            process.shared.pool.check()

    def teardown(self) -> None:
        self.cluster.settle()


def explore(orders: int, seed: int) -> None:
    hypothesis.seed(seed)(ClusterMachine)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]  # hypothesis leaves its type out
        ClusterMachine,
        settings=settings(
            max_examples=orders,
            stateful_step_count=40,
            deadline=None,
            database=None,  # or what failed before would come first, and a seed would not do the same again
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_no_order_of_events_loses_a_request_leaks_a_block_or_writes_over_one() -> None:
    explore(40, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(1, 10))
def test_ten_thousand_orders(seed: int) -> None:
    explore(1000, seed)
