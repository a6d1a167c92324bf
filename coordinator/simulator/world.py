"""One simulated deployment: virtual time, the real registry and router, modelled workers and their losses."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from coordinator.book import RegistrySettings
from coordinator.events import (
    Action,
    ChangeWorkerRole,
    DrainWorker,
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
from coordinator.planner.limits import Limits
from coordinator.planner.planner import Planner, PlannerRules
from coordinator.planner.proposal import Flip, Scale, Standing
from coordinator.planner.resizing import idlest
from coordinator.registry import TICK_S, Registry
from coordinator.report import Report
from coordinator.router import Router
from coordinator.simulator.clock import Clock
from coordinator.simulator.prefix_cache import BlockKeys
from coordinator.simulator.profile import Profile
from coordinator.simulator.worker import Worker
from coordinator.simulator.workload import Arrival
from pdserve.core.config import Admission, LocalPrefill, RoutingPolicy, WholeOnPrefill
from pdserve.core.errors import ConfigError, PdServeError
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.layout import CacheGroup, Fingerprint, GroupLayout
from pdserve.core.messages import (
    ChangeRole,
    ConnectPeer,
    DropPeer,
    FinishReason,
    Hello,
    PushesSettled,
    RenewLease,
    Role,
    RoleChanged,
    Up,
    WorkerInfo,
)
from pdserve.core.sampling import SamplingParams

MODEL: Final = "simulated"
_NET_S: Final = 2e-4
"""One way between coordinator and worker."""
_UNHEARD: Final = (Hello, ConnectPeer, DropPeer, RenewLease, PushesSettled)
"""Messages that change nothing for a modelled worker: it needs no introduction, and loses no push."""


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
    local_prefill: LocalPrefill = LocalPrefill.AUTO
    whole_on_prefill: WholeOnPrefill = WholeOnPrefill.NEVER
    fetch_prefixes: bool = False
    seed: int = 0
    max_queued_requests: int = 100_000
    timeout_s: float = 600.0
    heartbeat_s: float = 0.5
    failures: Failures = Failures()
    explain_last: int = 0
    """How many requests are remembered for who asks later."""
    planner: PlannerRules | None = None
    """What it proposes is done; None: the fleet stays as it is."""
    limits: Limits | None = None
    """How many workers the planner may have, where its rules let it add and retire some."""
    start_s: float = 30.0
    """Until a worker that is added takes requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    arrival: Arrival
    report: Report
    outcome: FinishReason | PdServeError


@dataclass(slots=True, kw_only=True)
class Run:
    """What a simulation came to."""

    ended: list[Ended] = field(default_factory=list)
    """Empty where the world was given another place for them."""
    span_s: float = 0.0
    """Virtual, from the first arrival to the last; at least a second."""
    worker_hours: float = 0.0
    """To the end of the last request; of one that is added, from when it is asked for."""
    events: int = 0
    flips: list[tuple[float, str]] = field(default_factory=list)
    """When the planner changed what, and why."""
    decisions: str = ""
    """A digest of every placement, in order: the same for the same setup, workload and seed."""


class World:
    def __init__(
        self, setup: Setup, arrivals: Sequence[Arrival], on_end: Callable[[Ended], None] | None = None
    ) -> None:
        """arrivals: in order of time. on_end: takes each request that ends, instead of `Run.ended`."""
        if setup.decode < 1 or setup.prefill < 0:
            raise ConfigError(f"wanted decode >= 1 and prefill >= 0, got {setup.decode} and {setup.prefill}")
        self._setup, self._arrivals = setup, arrivals
        settings = RegistrySettings(
            max_queued_requests=setup.max_queued_requests,
            max_attempts=3,
            lease_s=30.0,
            transfer_deadline_s=30.0,
            admission=setup.admission,
            explain_last=setup.explain_last,
            fetch_prefixes=setup.fetch_prefixes,
        )
        router = Router(setup.policy, setup.seed, setup.local_prefill, setup.whole_on_prefill)
        self.registry: Final = Registry(settings, router)
        self.clock: Final = Clock(network_s=_NET_S)
        self._keys: Final = BlockKeys(setup.profile.block_tokens)
        self._workers: dict[WorkerId, Worker] = {}
        self._roles: dict[WorkerId, Role] = {}
        self._changing: dict[WorkerId, Role] = {}
        """Told to take up another role, and not empty of the one they have."""
        self._coming = 0
        """Workers that were added, and take no requests yet."""
        self._leaving: set[WorkerId] = set()
        self._broken = 0
        """Workers that died and are not back yet."""
        self._paid_s, self._paid_until = 0.0, arrivals[0].at_s if arrivals else 0.0
        self._open: dict[RequestId, Arrival] = {}
        self._left = len(arrivals)
        self._planner = None if setup.planner is None else Planner(MODEL, setup.planner)
        self._rng = random.Random(f"{setup.seed}/failures")
        self._digest = hashlib.blake2b(digest_size=16)
        self._run = Run()
        self._on_end = self._run.ended.append if on_end is None else on_end

    def run(self) -> Run:
        """To the end of the last request."""
        setup, clock = self._setup, self.clock
        names = [(Role.PREFILL, i) for i in range(setup.prefill)]
        names += [(Role.DECODE, i) for i in range(setup.decode)]
        with _no_collector():
            for index, (role, number) in enumerate(names):
                worker = WorkerId(f"{role.value}-{number:04}")
                self._roles[worker] = role
                self._join(worker, epoch=1)
                clock.at(setup.heartbeat_s * index / len(names), partial(self._beat, worker))
                self._plan_failure(worker)
            self._next(iter(enumerate(self._arrivals)))
            clock.at(TICK_S, self._tick)
            if setup.planner is not None:
                clock.at(setup.planner.interval_s, self._plan)
            while self._left and clock.step():
                pass
        run, arrivals = self._run, self._arrivals
        start = arrivals[0].at_s if arrivals else 0.0
        run.span_s = max(arrivals[-1].at_s - start, 1.0) if arrivals else 0.0
        self._pay(clock.now)
        run.worker_hours = self._paid_s / 3600
        run.events, run.decisions = clock.events, self._digest.hexdigest()
        return run

    # --- time -----------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        self.handle(Tick(), now)
        self.clock.at(now + TICK_S, self._tick)

    def _plan(self, now: float) -> None:
        planner, rules = self._planner, self._setup.planner
        if planner is None or rules is None:
            return
        if self._coming or self._leaving:
            planner.changed(now)
        proposal = planner.plan(self.registry.fleet, now, self._setup.limits)
        if proposal.standing is Standing.ACTED:
            planner.changed(now)
            self._run.flips.append((now, str(proposal)))
            match proposal.change:
                case Flip(worker=worker, to=role):
                    self.handle(ChangeWorkerRole(worker=worker, role=role), now)
                case Scale(role=role, by=by):
                    self._scale(role, by, now)
        self.clock.at(now + rules.interval_s, self._plan)

    def _beat(self, worker: WorkerId, now: float) -> None:
        alive = self._workers.get(worker)
        if alive is not None:
            self._hear(alive, [alive.beat(now)], now)
            role = self._changing.get(worker)
            if role is not None and alive.empty:
                self._change_role(alive, role, now)
            if worker in self._leaving and alive.empty:
                self._retired(alive, now)
                return
        self.clock.at(now + self._setup.heartbeat_s, partial(self._beat, worker))

    def _next(self, rest: Iterator[tuple[int, Arrival]]) -> None:
        """The next arrival, when the one before it has come: a million need not be on the heap at once."""
        index, arrival = next(rest, (0, None))
        if arrival is not None:
            self.clock.at(arrival.at_s, lambda now: self._submit(index, arrival, now, rest))

    # --- workers' ports -------------------------------------------------------------------------------

    def later(self, worker: Worker, delay_s: float, act: Callable[[float], None]) -> None:
        self.clock.at(self.clock.now + delay_s, lambda now: act(now) if self._alive(worker) else None)

    def tell(self, worker: Worker, messages: Sequence[Up], now: float) -> None:
        self.clock.sent(lambda at: self._hear(worker, messages, at))

    def push(
        self, worker: Worker, to: WorkerId, attempt: AttemptId, now: float, *, written: int | None
    ) -> None:
        target = self._workers.get(to)
        if target is not None:
            target.landed(attempt, now, written=written)

    def _alive(self, worker: Worker) -> bool:
        return self._workers.get(worker.info.worker) is worker

    # --- the registry ---------------------------------------------------------------------------------

    def _submit(self, index: int, arrival: Arrival, now: float, rest: Iterator[tuple[int, Arrival]]) -> None:
        request = NewRequest(
            id=RequestId(f"r{index}"),
            model=MODEL,
            tokens=arrival.tokens(index),
            sampling=SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True, seed=0),
            eos_token_ids=(),
            cache_salt=b"",
            arrival=now,
            arrived=now,
            deadline=now + self._setup.timeout_s,
            ttft_target_s=arrival.sla.ttft_s,
            tpot_target_s=arrival.sla.tpot_s,
            priority=arrival.sla.priority,
            preemptible=arrival.sla.preemptible,
        )
        self._open[request.id] = arrival
        if self._planner is not None:
            sla = arrival.sla
            self._planner.tracker.arrived(arrival.input_tokens, sla.ttft_s, sla.tpot_s, now)
        self.handle(Submit(samples=(request,)), now)
        self._next(rest)

    def _hear(self, worker: Worker, messages: Iterable[Up], now: float) -> None:
        info = worker.info
        for message in messages:
            if self._alive(worker):
                self.handle(FromWorker(worker=info.worker, epoch=info.epoch, message=message), now)

    def handle(self, event: Event, now: float) -> None:
        """Something happens to the registry: a worker's message, or what an operator wants of it."""
        for action in self.registry.handle(event, now):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Send(worker=name, message=message):
                worker = self._workers.get(name)
                if isinstance(message, ChangeRole):
                    self._changing[name] = message.role
                if worker is not None and not isinstance(message, _UNHEARD):
                    self._digest.update(f"{name} {type(message).__name__};".encode())
                    self.clock.sent(lambda at: worker.handle(message, at) if self._alive(worker) else None)
            case End(request=request, outcome=outcome, report=report):
                self._left -= 1
                if self._planner is not None and not isinstance(outcome, PdServeError):
                    self._planner.tracker.answered(
                        report.prompt_tokens, report.cached_tokens, report.output_tokens, self.clock.now
                    )
                self._on_end(Ended(arrival=self._open.pop(request), report=report, outcome=outcome))
            case _:
                pass

    # --- workers come and go --------------------------------------------------------------------------

    def _join(self, name: WorkerId, *, epoch: int) -> None:
        role, profile = self._roles[name], self._setup.profile
        info = simulated_info(name, role, epoch, profile)
        self._workers[name] = Worker(info, profile, self, self._keys)
        self.handle(WorkerJoined(info=info, model=MODEL), self.clock.now)

    def _change_role(self, worker: Worker, role: Role, now: float) -> None:
        """The same process, empty of what it did: its next heartbeat comes from another kind of worker."""
        name, info = worker.info.worker, worker.info
        del self._changing[name]
        self._roles[name] = role
        changed = Worker(dataclasses.replace(info, role=role), self._setup.profile, self, self._keys)
        self._workers[name] = changed
        self.tell(changed, [RoleChanged(worker=name, epoch=info.epoch, role=role)], now)

    def _scale(self, role: Role, by: int, now: float) -> None:
        """Add workers, or drain those that are to go; `_beat` sees when nothing is left on them."""
        for _ in range(by):
            self._pay(now)
            self._coming += 1
            number = sum(name.startswith(role.value) for name in self._roles)
            name = WorkerId(f"{role.value}-{number:04}")
            self._roles[name] = role
            self.clock.at(now + self._setup.start_s, partial(self._added, name))
        for state in idlest(self.registry.fleet, MODEL, role)[: max(-by, 0)]:
            self._leaving.add(state.id)
            self.handle(DrainWorker(worker=state.id, timeout_s=None), now)

    def _added(self, name: WorkerId, now: float) -> None:
        self._pay(now)
        self._coming -= 1
        self._join(name, epoch=1)
        self._plan_failure(name)
        self._beat(name, now)

    def _retired(self, worker: Worker, now: float) -> None:
        name = worker.info.worker
        self._pay(now)
        self._leaving.discard(name)
        del self._workers[name]
        self.handle(WorkerGone(worker=name, epoch=worker.info.epoch, why="it was retired"), now)

    def _pay(self, now: float) -> None:
        """For the workers there are, up to now; those that are repaired too."""
        num_paid = len(self._workers) + self._coming + self._broken
        self._paid_s += num_paid * (now - self._paid_until)
        self._paid_until = now

    def _plan_failure(self, name: WorkerId) -> None:
        rate = self._setup.failures.per_worker_hour / 3600
        if rate > 0:
            self.clock.at(self.clock.now + self._rng.expovariate(rate), lambda now: self._die(name, now))

    def _die(self, name: WorkerId, now: float) -> None:
        worker = self._workers.get(name)
        if worker is None:
            return  # it was retired before
        self._hear(worker, worker.died(now), now)
        self._leaving.discard(name)
        self._broken += 1
        del self._workers[name]
        self._changing.pop(name, None)
        self.handle(WorkerGone(worker=name, epoch=worker.info.epoch, why="simulated loss"), now)

        def back(at: float) -> None:
            self._broken -= 1
            self._join(name, epoch=worker.info.epoch + 1)
            self._plan_failure(name)

        self.clock.at(now + self._setup.failures.repair_s, back)


@contextmanager
def _no_collector() -> Iterator[None]:
    """What a simulation makes has no cycles worth collecting, and looking for them takes a quarter of it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


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
