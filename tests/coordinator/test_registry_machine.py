"""Whatever happens in whatever order: no request is lost, none gets wrong tokens, no block stays behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import Role
from pdserve.core.sampling import SamplingParams
from pdserve.core.sla_settings import TenantSettings
from tests.support.model_workers import ModelPrefill
from tests.support.registry_world import SETTINGS, World, new_request

ROLES = {
    "prefill-0": Role.PREFILL,
    "prefill-1": Role.PREFILL,
    "decode-0": Role.DECODE,
    "decode-1": Role.DECODE,
}


LIMITED = replace(
    SETTINGS,
    max_queued_requests=12,
    queue_ttl_s=30.0,
    tenants={"limited": TenantSettings(weight=2, max_concurrent=4, max_tokens_per_s=100.0)},
)


class RegistryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(LIMITED)
        self.epochs = dict.fromkeys(ROLES, 0)
        self.count = 0
        for name in ("prefill-0", "decode-0"):
            self._join(name)

    def _join(self, name: str) -> None:
        self.epochs[name] += 1
        self.world.join(name, ROLES[name], epoch=self.epochs[name], num_blocks=8, max_num_seqs=3)

    @rule(
        n=st.integers(1, 3),
        prompt=st.lists(st.integers(1, 200), min_size=1, max_size=40),
        max_tokens=st.integers(1, 5),
        patience=st.sampled_from([1.0, 20.0, 1e6]),
        priority=st.integers(-1, 1),
        logprobs=st.sampled_from([None, 0, 2]),
        tenant=st.sampled_from(["", "limited", "other"]),
    )
    def submit(
        self,
        n: int,
        prompt: list[int],
        max_tokens: int,
        patience: float,
        priority: int,
        logprobs: int | None,
        tenant: str,
    ) -> None:
        self.count += 1
        sampling = SamplingParams(max_tokens=max_tokens, seed=1, logprobs=logprobs, prompt_logprobs=logprobs)
        self.world.submit(
            *(
                new_request(
                    f"r{self.count}.{index}",
                    prompt=prompt,
                    sampling=sampling,
                    deadline=self.world.now + patience,
                    priority=priority,
                    arrived=self.world.now,
                    preemptible=priority == 1,
                    ttft_target_s=0.5 if priority == -1 else None,
                    tenant=tenant,
                )
                for index in range(n)
            )
        )

    @rule(count=st.integers(3, 7), steps=st.integers(2, 6), prompt=st.integers(1, 12))
    def a_rush(self, count: int, steps: int, prompt: int) -> None:
        """Batch work takes every place, and writes; then somebody is in a hurry."""
        for _ in range(count):
            self._one(max_tokens=30, priority=1, preemptible=True)
        for _ in range(steps):
            for worker in list(self.world.workers):
                self.world.step(worker)
            while self.world.pushes:
                self.world.land(0)
            self.world.flush()
        self._one(prompt=[1] * prompt, priority=-1, ttft_target_s=0.5)

    def _one(self, **fields: Any) -> None:
        self.count += 1
        name, now = f"r{self.count}.0", self.world.now
        self.world.submit(new_request(name, deadline=now + 1e6, arrived=now, **fields))

    @precondition(lambda self: any(self.world.down.values()))
    @rule(data=st.data())
    def a_worker_hears(self, data: st.DataObject) -> None:
        self.world.deliver_down(data.draw(st.sampled_from([w for w, q in self.world.down.items() if q])))

    @precondition(lambda self: any(self.world.up.values()))
    @rule(data=st.data())
    def the_coordinator_hears(self, data: st.DataObject) -> None:
        self.world.deliver_up(data.draw(st.sampled_from([w for w, q in self.world.up.items() if q])))

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data())
    def a_worker_computes(self, data: st.DataObject) -> None:
        self.world.step(data.draw(st.sampled_from(sorted(self.world.workers))))

    @precondition(lambda self: self.world.pushes)
    @rule(data=st.data())
    def a_push_lands(self, data: st.DataObject) -> None:
        self.world.land(data.draw(st.integers(0, len(self.world.pushes) - 1)))

    @rule()
    def everything_moves(self) -> None:
        self.world.run()

    @precondition(lambda self: self.world.registry.num_active)
    @rule(data=st.data(), stop=st.booleans())
    def a_request_is_cut_short(self, data: st.DataObject, stop: bool) -> None:
        active = [r for r in self.world.requests if self.world.registry.is_active(r)]
        request = data.draw(st.sampled_from(active))
        if stop and self.world.output[request]:
            self.world.stop_matched(request)
        else:
            self.world.cancel(request)

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.tick(seconds)

    @precondition(lambda self: self.world.linked)
    @rule(data=st.data())
    def a_worker_falls_silent(self, data: st.DataObject) -> None:
        self.world.lose(data.draw(st.sampled_from(sorted(self.world.linked))))

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data())
    def a_process_ends(self, data: st.DataObject) -> None:
        self.world.end_process(data.draw(st.sampled_from(sorted(self.world.workers))))

    @precondition(lambda self: any(w.startswith("decode") for w in self.world.linked))
    @rule(data=st.data(), timeout_s=st.sampled_from([0.5, 30.0]))
    def a_worker_is_drained(self, data: st.DataObject, timeout_s: float) -> None:
        names = [w for w in sorted(self.world.linked) if w.startswith("decode")]
        self.world.drain(data.draw(st.sampled_from(names)), timeout_s)

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data())
    def a_connection_is_made_again(self, data: st.DataObject) -> None:
        self.world.reconnect(data.draw(st.sampled_from(sorted(self.world.workers))))

    @rule(name=st.sampled_from(sorted(ROLES)))
    def a_worker_joins(self, name: str) -> None:
        self._join(name)

    @precondition(lambda self: any(w.startswith("decode") for w in self.world.linked))
    @rule(data=st.data())
    def a_worker_refuses(self, data: st.DataObject) -> None:
        names = [w for w in sorted(self.world.linked) if w.startswith("decode")]
        worker = self.world.workers[data.draw(st.sampled_from(names))]
        assert not isinstance(worker, ModelPrefill)
        worker.refuse_next += 1

    @precondition(lambda self: self._attempts())
    @rule(data=st.data(), retryable=st.sampled_from([True, True, True, False]))
    def a_worker_fails_an_attempt(self, data: st.DataObject, retryable: bool) -> None:
        name, attempt = data.draw(st.sampled_from(self._attempts()))
        self.world.up[name] += self.world.workers[name].fail(attempt, retryable=retryable)

    def _attempts(self) -> list[tuple[WorkerId, AttemptId]]:
        """What linked workers have in hand and have not given up yet."""
        found = []
        for name in sorted(self.world.linked):
            model = self.world.workers[name]
            if isinstance(model, ModelPrefill):
                found += [(name, a) for a, reading in model.readings.items() if reading.stages[0] != "settle"]
            else:
                found += [(name, a) for a, held in model.reservations.items() if not held.quarantined]
        return found

    @invariant()
    def the_same_request_is_never_in_two_places(self) -> None:
        assert self.world.registry.num_active == len(self.world.requests) - len(self.world.ends)
        assert self.world.registry.num_waiting <= self.world.registry.num_active

    def teardown(self) -> None:
        """Every process that was given up ends, workers come back: then everything comes to rest."""
        for name in sorted(self.world.workers):
            if name not in self.world.linked:
                self.world.end_process(name)
        # A new process, which nobody has drained.
        self._join("decode-0")
        for _ in range(60):
            self.world.run()
            self.world.tick(1.0)
            for worker in sorted(self.world.linked):
                self.world.beat(worker)
            if not self.world.registry.num_active:
                break
        self.world.run()
        self.world.assert_at_rest()
        assert self.world.registry.num_unsettled == 0


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
