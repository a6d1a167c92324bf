"""One simulated deployment: virtual time, the real registry and router, modelled workers and their losses."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from coordinator.book import RegistrySettings
from coordinator.events import (
    Action,
    End,
    Event,
    FromWorker,
    NewRequest,
    Send,
    Submit,
    Tick,
    WorkerGone,
    WorkerJoined,
)
from coordinator.registry import TICK_S, Registry
from coordinator.report import Report
from coordinator.router import Router
from coordinator.simulator.profile import Profile
from coordinator.simulator.workers import DecodeWorker, PrefillWorker, Worker
from coordinator.simulator.workload import Arrival
from pdserve.core.config import Admission, RoutingPolicy
from pdserve.core.errors import ConfigError, PdServeError
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.layout import CacheGroup, Fingerprint, GroupLayout
from pdserve.core.messages import FinishReason, Role, Up, WorkerInfo
from pdserve.core.sampling import SamplingParams

MODEL: Final = "simulated"
_NET_S: Final = 2e-4
"""One way between coordinator and worker."""
_ZEROS: Final = [0] * 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Workers that die at random and come back."""

    per_worker_hour: float = 0.0
    repair_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    prefill: int
    """0: decode workers read prompts themselves."""
    decode: int
    profile: Profile
    policy: RoutingPolicy
    admission: Admission = Admission.DEADLINE
    seed: int = 0
    max_queued_requests: int = 100_000
    timeout_s: float = 600.0
    heartbeat_s: float = 0.5
    failures: Failures = Failures()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    arrival: Arrival
    report: Report
    outcome: FinishReason | PdServeError


@dataclass(slots=True, kw_only=True)
class Run:
    """What a simulation came to."""

    ended: list[Ended] = field(default_factory=list)
    span_s: float = 0.0
    """Virtual, from the first arrival to the last end."""
    events: int = 0
    decisions: str = ""
    """A digest of every placement, in order: the same for the same setup, workload and seed."""


class World:
    def __init__(self, setup: Setup, arrivals: Sequence[Arrival]) -> None:
        if setup.decode < 1 or setup.prefill < 0:
            raise ConfigError(f"wanted decode >= 1 and prefill >= 0, got {setup.decode} and {setup.prefill}")
        self._setup, self._arrivals = setup, arrivals
        settings = RegistrySettings(
            max_queued_requests=setup.max_queued_requests,
            max_attempts=3,
            lease_s=30.0,
            transfer_deadline_s=30.0,
            admission=setup.admission,
        )
        self.registry: Final = Registry(settings, Router(setup.policy, setup.seed))
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self._now = 0.0
        self._workers: dict[WorkerId, Worker] = {}
        self._roles: dict[WorkerId, Role] = {}
        self._open: dict[RequestId, Arrival] = {}
        self._left = len(arrivals)
        self._rng = random.Random(f"{setup.seed}/failures")
        self._digest = hashlib.blake2b(digest_size=16)
        self._run = Run()

    def run(self) -> Run:
        """To the end of the last request."""
        setup = self._setup
        names = [(Role.PREFILL, i) for i in range(setup.prefill)] + [
            (Role.DECODE, i) for i in range(setup.decode)
        ]
        for index, (role, number) in enumerate(names):
            worker = WorkerId(f"{role.value}-{number:04}")
            self._roles[worker] = role
            self._join(worker, epoch=1)
            self._at(setup.heartbeat_s * index / len(names), partial(self._beat, worker))
            self._plan_failure(worker)
        for index, arrival in enumerate(self._arrivals):
            self._at(arrival.at_s, partial(self._submit, index, arrival))
        self._at(TICK_S, self._tick)
        heap = self._heap
        while self._left and heap:
            self._now, _, act = heapq.heappop(heap)
            self._run.events += 1
            act(self._now)
        self._run.span_s = self._now - (self._arrivals[0].at_s if self._arrivals else 0.0)
        self._run.decisions = self._digest.hexdigest()
        return self._run

    # --- time -----------------------------------------------------------------------------------------

    def _at(self, at: float, act: Callable[[float], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at, self._order, act))

    def _tick(self, now: float) -> None:
        self._handle(Tick(), now)
        self._at(now + TICK_S, self._tick)

    def _beat(self, worker: WorkerId, now: float) -> None:
        alive = self._workers.get(worker)
        if alive is not None:
            self._from(alive, alive.beat(now), now)
        self._at(now + self._setup.heartbeat_s, partial(self._beat, worker))

    # --- workers' ports -------------------------------------------------------------------------------

    def later(self, worker: Worker, delay_s: float, act: Callable[[float], None]) -> None:
        self._at(self._now + delay_s, lambda now: act(now) if self._alive(worker) else None)

    def tell(self, worker: Worker, message: Up, now: float) -> None:
        self._at(now + _NET_S, lambda at: self._from(worker, message, at))

    def push(self, worker: Worker, to: WorkerId, attempt: AttemptId, now: float) -> None:
        target = self._workers.get(to)
        if isinstance(target, DecodeWorker):
            target.landed(attempt, now)

    def _alive(self, worker: Worker) -> bool:
        return self._workers.get(worker.info.worker) is worker

    # --- the registry ---------------------------------------------------------------------------------

    def _submit(self, index: int, arrival: Arrival, now: float) -> None:
        request = NewRequest(
            id=RequestId(f"r{index}"),
            model=MODEL,
            tokens=_ZEROS[: arrival.input_tokens],
            sampling=SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True, seed=0),
            eos_token_ids=(),
            cache_salt=b"",
            arrival=now,
            arrived=now,
            deadline=now + self._setup.timeout_s,
            ttft_target_s=arrival.sla.ttft_s,
            tpot_target_s=arrival.sla.tpot_s,
            priority=arrival.sla.priority,
        )
        self._open[request.id] = arrival
        self._handle(Submit(samples=(request,)), now)

    def _from(self, worker: Worker, message: Up, now: float) -> None:
        if self._alive(worker):
            info = worker.info
            self._handle(FromWorker(worker=info.worker, epoch=info.epoch, message=message), now)

    def _handle(self, event: Event, now: float) -> None:
        for action in self.registry.handle(event, now):
            self._perform(action, now)

    def _perform(self, action: Action, now: float) -> None:
        match action:
            case Send(worker=name, message=message):
                worker = self._workers.get(name)
                if worker is not None:
                    self._digest.update(f"{name} {type(message).__name__};".encode())
                    self._at(
                        now + _NET_S, lambda at: worker.handle(message, at) if self._alive(worker) else None
                    )
            case End(request=request, outcome=outcome, report=report):
                arrival = self._open.pop(request)
                self._left -= 1
                self._run.ended.append(Ended(arrival=arrival, report=report, outcome=outcome))
            case _:
                pass

    # --- workers come and go --------------------------------------------------------------------------

    def _join(self, name: WorkerId, *, epoch: int) -> None:
        role, profile = self._roles[name], self._setup.profile
        info = simulated_info(name, role, epoch, profile)
        kind = PrefillWorker if role is Role.PREFILL else DecodeWorker
        self._workers[name] = kind(info, profile, self)
        self._handle(WorkerJoined(info=info, model=MODEL), self._now)

    def _plan_failure(self, name: WorkerId) -> None:
        rate = self._setup.failures.per_worker_hour / 3600
        if rate > 0:
            self._at(self._now + self._rng.expovariate(rate), lambda now: self._die(name, now))

    def _die(self, name: WorkerId, now: float) -> None:
        worker = self._workers[name]
        for message in worker.died(now):
            self._from(worker, message, now)
        del self._workers[name]
        self._handle(WorkerGone(worker=name, epoch=worker.info.epoch, why="simulated loss"), now)

        def back(at: float) -> None:
            self._join(name, epoch=worker.info.epoch + 1)
            self._plan_failure(name)

        self._at(now + self._setup.failures.repair_s, back)


def simulated_info(name: WorkerId, role: Role, epoch: int, profile: Profile) -> WorkerInfo:
    """How a modelled worker introduces itself."""
    # One layer whose K and V of a token take what the profile says.
    group = CacheGroup(
        name="full", num_layers=1, num_kv_heads=1, head_dim=profile.kv_token_bytes // 4, dtype="bfloat16"
    )
    layout = GroupLayout(group=group, block_tokens=profile.block_tokens)
    return WorkerInfo(
        worker=name,
        role=role,
        epoch=epoch,
        pid=0,
        host="simulated",
        fingerprint=Fingerprint(protocol=1, model=MODEL, layouts=(layout,)),
        transfer_metadata=b"",
        num_blocks=profile.num_blocks,
        block_tokens=profile.block_tokens,
        max_model_len=profile.num_blocks * profile.block_tokens,
        max_num_seqs=profile.max_num_seqs,
    )
