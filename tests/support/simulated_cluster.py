"""The whole cluster in one thread, from one seed, with a clock of its own.

The registry is the coordinator's and the schedulers are the workers'; the network between them, transfers,
processes and the model are simulated. Whatever happens, in whatever order:

- a client gets the tokens it should, each once, in order, and exactly one end;
- no write lands in a block that does not wait for it;
- every block comes back, and no request, attempt or push is left anywhere.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

from coordinator.book import RegistrySettings
from coordinator.events import (
    Action as CoordinatorAction,
)
from coordinator.events import (
    ClientCancelled,
    DrainWorker,
    Emit,
    End,
    FromWorker,
    NewRequest,
    Submit,
    Tick,
    UndrainWorker,
    WorkerDown,
    WorkerGone,
    WorkerJoined,
)
from coordinator.events import Event as CoordinatorEvent
from coordinator.events import Send as CoordinatorSend
from coordinator.links import Links
from coordinator.registry import Registry
from coordinator.router import Router
from pdserve.core.config import RoutingPolicy, WholeOnPrefill
from pdserve.core.errors import PdServeError
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.messages import Hello, PushPrefix, Role, StartDecode
from pdserve.core.sampling import SamplingParams
from pdserve.worker.events import (
    Action,
    ConnectTransfer,
    CoordinatorLost,
    DisconnectTransfer,
    Event,
    FromCoordinator,
    OwnerId,
    Send,
    SubmitPush,
)
from tests.support.simulated_process import (
    EOS,
    LAYERS,
    MAX_LEN,
    MODEL,
    Process,
    computed,
    new_process,
    next_token,
)
from tests.support.simulated_transfers import Transfers

ROLES = {
    "prefill-0": Role.PREFILL,
    "prefill-1": Role.PREFILL,
    "decode-0": Role.DECODE,
    "decode-1": Role.DECODE,
}
SETTINGS = RegistrySettings(
    max_queued_requests=64,
    max_attempts=4,
    lease_s=4.0,
    transfer_deadline_s=3.0,
    drain_timeout_s=5.0,
    fetch_prefixes=True,
)
SETTLE_TURNS = 400


class FastLinks(Links):
    """Transfers take no time here, so nothing would ever be measured."""

    def bytes_per_s(self, source: WorkerId, target: WorkerId) -> float | None:
        return 1e9


class SimulatedCluster:
    """Every `do_...` is one thing that can happen; those that cannot happen now do nothing."""

    def __init__(self, rng: random.Random) -> None:
        self.random = rng
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self.processes: dict[WorkerId, Process] = {}
        self.epochs: Counter[str] = Counter()
        self.transfers = Transfers()
        self.requests: dict[RequestId, NewRequest] = {}
        self.output: dict[RequestId, list[int]] = {}
        self.ends: dict[RequestId, str] = {}
        self._owners = itertools.count(1)
        self.registry = self._new_registry()
        for name in ROLES:
            self.start(name)

    # --- processes ----------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """A new process of this name; the one before it has ended."""
        self.epochs[name] += 1
        worker = WorkerId(name)
        self.processes[worker] = new_process(name, ROLES[name], self.epochs[name])
        self.link(self.processes[worker])

    def link(self, process: Process) -> None:
        """The coordinator dials it."""
        if process.stopped:
            return
        self.unlink(process)
        process.linked, process.owner = True, OwnerId(next(self._owners))
        process.down.append(Hello(protocol=PROTOCOL_VERSION, sender="coordinator"))
        process.up.append(process.scheduler.heartbeat())
        self.tell(WorkerJoined(info=process.info, model=MODEL))

    def unlink(self, process: Process) -> None:
        """The connection breaks, with what is on it; both sides notice."""
        if not process.linked:
            return
        process.linked = False
        process.down.clear()
        process.up.clear()
        process.inbox.append(CoordinatorLost(process.owner))
        self.tell(WorkerDown(worker=process.id, epoch=process.info.epoch, why="simulated"))

    def end_process(self, process: Process) -> None:
        """It is gone: nothing of it writes any more, and nobody writes into it."""
        del self.processes[process.id]
        process.linked = False
        self.transfers.end_with(process)
        self.tell(WorkerGone(worker=process.id, epoch=process.info.epoch, why="simulated"))

    def any_process(self) -> Process:
        return self.random.choice(list(self.processes.values()))

    # --- the coordinator ----------------------------------------------------------------------------

    def _new_registry(self) -> Registry:
        router = Router(
            RoutingPolicy.POWER_OF_TWO,
            seed=self.random.randrange(1000),
            whole_on_prefill=WholeOnPrefill.AUTO,
        )
        registry = Registry(SETTINGS, router)
        registry.fleet.links = FastLinks()
        return registry

    def tell(self, event: CoordinatorEvent) -> None:
        for action in self.registry.handle(event, self.now):
            self._perform(action)

    def _perform(self, action: CoordinatorAction) -> None:
        match action:
            case CoordinatorSend(worker=worker, message=message):
                process = self.processes[worker]
                assert process.linked, f"{message} was sent to {worker}, which is down"
                process.down.append(message)
                if isinstance(message, StartDecode) and process.info.role is Role.PREFILL:
                    self.counts["kept whole"] += 1
                if isinstance(message, PushPrefix):
                    self.counts["prefix fetched"] += 1
            case Emit(request=request, tokens=tokens):
                assert request not in self.ends, f"{request}: output after its end"
                asked, output = self.requests[request], self.output[request]
                for token in tokens:
                    wanted = next_token([*asked.tokens, *output], asked.sampling.seed)
                    assert token == wanted, f"{request}: token {len(output)} is not what it has to be"
                    output.append(token)
            case End(request=request, outcome=outcome):
                assert request not in self.ends, f"{request}: ended twice"
                error = isinstance(outcome, PdServeError)
                self.ends[request] = type(outcome).__name__ if error else str(outcome)
                self.counts["failed" if error else "finished"] += 1
                if not error:
                    self._check_whole(request)
            case _:
                pass

    def _check_whole(self, request: RequestId) -> None:
        asked, output = self.requests[request], self.output[request]
        ended = output[-1:] == [EOS] or len(output) == asked.sampling.max_tokens
        ended = ended or len(asked.tokens) + len(output) >= MAX_LEN
        assert ended or self.ends[request] == "abort", f"{request}: finished after {len(output)} tokens"

    # --- workers ------------------------------------------------------------------------------------

    def give(self, process: Process, event: Event) -> None:
        self.act(process, process.scheduler.handle(event, self.now))

    def act(self, process: Process, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(owner, message):
                    if process.linked and owner == process.owner:
                        process.up.append(message)
                case SubmitPush(push):
                    self.transfers.submit(process, push, self.processes.get(push.peer))
                case ConnectTransfer(peer):
                    self.transfers.connect(process, peer, self.processes.get(peer.peer))
                case DisconnectTransfer(peer, epoch):
                    self.transfers.disconnect(process, peer, epoch)
                case _:
                    raise AssertionError(f"{action}: there are no tiers here")

    # --- things that happen -------------------------------------------------------------------------

    def do_submit(self, num_prompt: int, max_tokens: int, num_samples: int, patience_s: float) -> None:
        number = len(self.requests)
        prompt = [self.random.randrange(2) + 3 for _ in range(num_prompt)]
        samples = tuple(
            NewRequest(
                id=RequestId(f"r{number}.{index}"),
                model=MODEL,
                tokens=prompt,
                sampling=SamplingParams(max_tokens=max_tokens, seed=number % 7 + index),
                eos_token_ids=(EOS,),
                cache_salt=b"",
                arrival=self.now,
                arrived=self.now,
                deadline=self.now + patience_s,
                priority=self.random.randrange(3),
            )
            for index in range(num_samples)
        )
        for sample in samples:
            self.requests[sample.id], self.output[sample.id] = sample, []
        self.tell(Submit(samples=samples))
        self.counts["submitted"] += num_samples

    def do_cancel(self) -> None:
        active = [request for request in self.requests if self.registry.is_active(request)]
        if active:
            self.tell(ClientCancelled(request=self.random.choice(active), reason="simulated"))
            self.counts["cancelled"] += 1

    def do_deliver_down(self, process: Process) -> None:
        if process.down and not process.stopped:
            self.give(process, FromCoordinator(process.owner, process.down.popleft()))

    def do_deliver_up(self, process: Process) -> None:
        if process.up:
            epoch, message = process.info.epoch, process.up.popleft()
            self.tell(FromWorker(worker=process.id, epoch=epoch, message=message))

    def do_inbox(self, process: Process) -> None:
        if process.inbox and not process.stopped:
            self.give(process, process.inbox.popleft())

    def do_step(self, process: Process, *, fails: bool = False) -> None:
        if process.stopped:
            return
        while process.inbox:  # as the compute loop does before each step
            self.give(process, process.inbox.popleft())
        self.act(process, process.scheduler.sweep(self.now))
        plan, actions = process.scheduler.schedule(self.now)
        self.act(process, actions)
        if plan is None:
            return
        if fails:
            self.act(process, process.scheduler.fail_step(RuntimeError("simulated"), self.now))
            self.counts["step failed"] += 1
            return
        if plan.chunks:
            for first in (0, LAYERS // 2):
                self.act(process, process.scheduler.layers_done(plan, first, first + LAYERS // 2, self.now))
        self.act(process, process.scheduler.complete(plan, computed(plan), self.now))

    def do_end_push(self, index: int, how: str) -> None:
        """how: lands, fails, fails halfway, fails after landing, is lost."""
        if self.transfers.flying:
            self.transfers.end_push(index, how)
            self.counts[f"push {how}"] += 1

    def do_note(self, index: int, *, again: bool = False) -> None:
        """A note arrives; `again`: and will once more."""
        if self.transfers.notes:
            self.transfers.arrive(index, again=again)

    def do_beat(self, process: Process) -> None:
        if process.linked and not process.stopped:
            process.up.append(process.scheduler.heartbeat())

    def do_pass_time(self, seconds: float) -> None:
        self.now += seconds
        if num_late := self.transfers.expire(self.now):
            self.counts["push timed out"] += num_late
        for process in list(self.processes.values()):
            if not process.stopped:
                self.act(process, process.scheduler.sweep(self.now))
        self.tell(Tick())

    def do_kill(self, process: Process) -> None:
        """SIGKILL; the supervisor starts a successor."""
        self.end_process(process)
        self.start(str(process.id))
        self.counts["killed"] += 1

    def do_stop(self, process: Process) -> None:
        """SIGSTOP; the coordinator gives it up after a while, and does so here at once."""
        if not process.stopped:
            process.stopped, process.linked = True, False
            process.up.clear()
            self.tell(WorkerDown(worker=process.id, epoch=process.info.epoch, why="silent"))
            process.inbox.append(CoordinatorLost(process.owner))  # it will see that when it goes on
            process.down.clear()
            self.counts["stopped"] += 1

    def do_continue(self, process: Process) -> None:
        """SIGCONT, and the coordinator finds it again."""
        if process.stopped:
            process.stopped = False
            self.link(process)
            self.counts["continued"] += 1

    def do_break_connection(self, process: Process) -> None:
        if process.linked:
            self.link(process)
            self.counts["connection broken"] += 1

    def do_restart_coordinator(self) -> None:
        """Its clients see their streams break; workers see their owner go; the next one knows nothing."""
        for request in self.requests:
            if request not in self.ends:
                self.ends[request] = "CoordinatorKilled"
                self.counts["cut off"] += 1
        self.registry = self._new_registry()
        for process in self.processes.values():
            process.linked = False
            process.down.clear()
            process.up.clear()
            process.inbox.append(CoordinatorLost(process.owner))
        for process in self.processes.values():
            self.link(process)
        self.counts["coordinator restarted"] += 1

    def do_drain(self, process: Process) -> None:
        self.tell(DrainWorker(worker=process.id, timeout_s=None))
        self.counts["drained"] += 1

    def do_undrain(self, process: Process) -> None:
        self.tell(UndrainWorker(worker=process.id))

    # --- a life -------------------------------------------------------------------------------------

    def turn(self, faults: float = 1.0) -> None:
        """One thing happens, drawn from the seed. faults: how often what goes wrong does, 0 never."""
        rng = self.random
        process = self.any_process()
        if rng.random() < 0.02 * faults:
            self._fault(process)
            return
        how = "lands"
        if rng.random() < 0.2 * faults:
            how = rng.choice(["fails", "fails halfway", "fails after landing", "is lost"])
        calm: list[tuple[float, Callable[[], None]]] = [
            (
                1.0,
                lambda: self.do_submit(
                    rng.randint(1, 28), rng.randint(1, 20), rng.choice([1, 1, 1, 2, 3]), 60.0
                ),
            ),
            (1.0, lambda: self.do_pass_time(rng.uniform(0.0, 0.05))),
            (14.0, lambda: self.do_deliver_down(process)),
            (14.0, lambda: self.do_deliver_up(process)),
            (12.0, lambda: self.do_step(process)),
            (10.0, lambda: self.do_end_push(rng.randrange(64), how)),
            (8.0, lambda: self.do_note(rng.randrange(64), again=rng.random() < 0.05 * faults)),
            (4.0, lambda: self.do_inbox(process)),
            (2.0, lambda: self.do_beat(process)),
        ]
        weights = [weight for weight, _ in calm]
        rng.choices([act for _, act in calm], weights)[0]()

    def _fault(self, process: Process) -> None:
        rng = self.random
        stopped = [p for p in self.processes.values() if p.stopped]
        draining = [p for p in self.processes.values() if p.shared.duty.draining]
        faults: list[tuple[float, Callable[[], None]]] = [
            (3.0, self.do_cancel),
            (2.0, lambda: self.do_pass_time(rng.uniform(0.5, 5.0))),
            (2.0, lambda: self.do_step(process, fails=True)),
            (2.0, lambda: self.do_stop(process)),
            (4.0, lambda: self.do_continue(rng.choice(stopped or [process]))),
            (2.0, lambda: self.do_break_connection(process)),
            (2.0, lambda: self.do_drain(process)),
            (4.0, lambda: self.do_undrain(rng.choice(draining or [process]))),
            (1.0, lambda: self.do_kill(process)),
            (0.8, self.do_restart_coordinator),
        ]
        rng.choices([act for _, act in faults], [weight for weight, _ in faults])[0]()

    def settle(self) -> None:
        """Nothing goes wrong any more: let everything come to rest, and check that nothing is left."""
        for process in list(self.processes.values()):
            # What is stopped, or has a transfer that nobody will ever hear of, is replaced by operators.
            if process.stopped or any(process in (f.sender, f.target) for f in self.transfers.lost):
                self.do_kill(process)
        for _ in range(SETTLE_TURNS):
            self._move_everything()
            if self._at_rest():
                break
            for process in self.processes.values():
                self.do_undrain(process)
                self.do_beat(process)
            self.do_pass_time(0.25)
        self.check_nothing_is_left()

    def _move_everything(self) -> None:
        while self.transfers.flying:
            self.do_end_push(0, "lands")
        while self.transfers.notes:
            self.do_note(0)
        for process in list(self.processes.values()):
            while process.down or process.up or process.inbox:
                self.do_deliver_down(process)
                self.do_inbox(process)
                self.do_deliver_up(process)
            self.do_step(process)

    def _at_rest(self) -> bool:
        return not (
            self.requests.keys() - self.ends.keys()
            or self.registry.num_active
            or self.registry.num_unsettled
            or self.transfers.flying  # also one that moves no block, and only says that an attempt is settled
            or any(self.held_by(process) for process in self.processes.values())
        )

    def held_by(self, process: Process) -> int:
        counts = process.scheduler.heartbeat().blocks
        assert counts.conserved, counts
        return counts.held + counts.quarantined

    def check_nothing_is_left(self) -> None:
        for process in self.processes.values():
            process.shared.pool.audit()
        assert self.requests.keys() == self.ends.keys(), sorted(self.requests.keys() - self.ends.keys())
        assert self.registry.num_active == self.registry.num_waiting == self.registry.num_unsettled == 0
        for process in self.processes.values():
            assert self.held_by(process) == 0, f"{process.id} keeps blocks"
            assert process.scheduler.idle, f"{process.id} keeps requests"
        for state in self.registry.fleet:
            assert not state.blocks_placed, state
            assert not state.prefill_left, state
            assert not state.unanswered, state
