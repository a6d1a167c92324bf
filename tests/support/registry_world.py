"""A registry with model workers around it: every queue, clock and failure is in the test's hands."""

from __future__ import annotations

from collections import deque
from typing import Any

from coordinator.book import RegistrySettings
from coordinator.events import (
    Action,
    ClientCancelled,
    DrainWorker,
    Emit,
    EmitPrompt,
    End,
    Event,
    FromWorker,
    NewRequest,
    Send,
    StopMatched,
    Submit,
    Tick,
    WorkerDown,
    WorkerGone,
    WorkerJoined,
)
from coordinator.registry import Registry
from coordinator.router import Router
from pdserve.core.config import RoutingPolicy
from pdserve.core.errors import Overloaded, PdServeError
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import Down, Role, Up
from pdserve.core.sampling import SamplingParams
from tests.support.model_workers import ModelDecode, ModelPrefill, ModelPush, continuation, worker_info

MODEL = "scripted"
SETTINGS = RegistrySettings(max_queued_requests=32, max_attempts=3, lease_s=3.0, transfer_deadline_s=3.0)


def new_request(
    name: str = "r",
    *,
    prompt: list[int] | None = None,
    max_tokens: int = 4,
    deadline: float = 1e9,
    sampling: SamplingParams | None = None,
    priority: int = 0,
    arrived: float = 0.0,
    **more: Any,
) -> NewRequest:
    """more: further fields of `NewRequest`."""
    return NewRequest(
        id=RequestId(name),
        model=MODEL,
        tokens=prompt or [1, 2, 3],
        sampling=sampling or SamplingParams(max_tokens=max_tokens, seed=1),
        eos_token_ids=(0,),
        cache_salt=b"salt",
        arrival=100.0,
        arrived=arrived,
        deadline=deadline,
        priority=priority,
        **more,
    )


class World:
    def __init__(
        self, settings: RegistrySettings = SETTINGS, policy: RoutingPolicy = RoutingPolicy.POWER_OF_TWO
    ) -> None:
        self.registry = Registry(settings, Router(policy, seed=7))
        self.now = 0.0
        self.workers: dict[WorkerId, ModelDecode | ModelPrefill] = {}
        self.linked: set[WorkerId] = set()
        self.down: dict[WorkerId, deque[Down]] = {}
        self.up: dict[WorkerId, deque[Up]] = {}
        self.pushes: list[ModelPush] = []
        self.requests: dict[RequestId, NewRequest] = {}
        self.output: dict[RequestId, list[int]] = {}
        self.prompt_logprobs: dict[RequestId, int] = {}
        self.ends: dict[RequestId, End] = {}
        self.sent: list[Send] = []

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Action]:
        actions = self.registry.handle(event, self.now)
        for action in actions:
            self._perform(action)
        return actions

    def submit(self, *samples: NewRequest) -> list[Action]:
        for sample in samples:
            assert sample.id not in self.requests
            self.requests[sample.id] = sample
            self.output[sample.id] = []
        return self.handle(Submit(samples=samples))

    def cancel(self, name: str) -> None:
        self.handle(ClientCancelled(request=RequestId(name), reason="test"))

    def stop_matched(self, name: str) -> None:
        self.handle(StopMatched(request=RequestId(name)))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.handle(Tick())

    def join(
        self, name: str, role: Role, *, epoch: int = 1, num_blocks: int = 64, max_num_seqs: int = 16
    ) -> None:
        """A new process; of one known by this name, the process has ended."""
        self._end_process(WorkerId(name))
        info = worker_info(name, role, epoch=epoch, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
        self.workers[info.worker] = ModelDecode(info) if role is Role.DECODE else ModelPrefill(info)
        self.down[info.worker], self.up[info.worker] = deque(), deque()
        self.linked.add(info.worker)
        self.handle(WorkerJoined(info=info, model=MODEL))

    def lose(self, name: str) -> None:
        """The connection ends; the process goes on, and so do its writes."""
        worker = WorkerId(name)
        self.linked.discard(worker)
        self.down[worker].clear()
        self.up[worker].clear()
        self.handle(WorkerDown(worker=worker, epoch=self.workers[worker].info.epoch, why="test"))

    def end_process(self, name: str) -> None:
        worker = WorkerId(name)
        epoch = self.workers[worker].info.epoch
        self._end_process(worker)
        self.handle(WorkerGone(worker=worker, epoch=epoch, why="test"))

    def _end_process(self, worker: WorkerId) -> None:
        self.workers.pop(worker, None)
        self.linked.discard(worker)
        self.down.pop(worker, None)
        self.up.pop(worker, None)
        self.pushes = [p for p in self.pushes if worker not in (p.prefill, p.decode)]

    # --- messages move one at a time ----------------------------------------------------------------

    def deliver_down(self, worker: WorkerId) -> None:
        message = self.down[worker].popleft()
        self.up[worker] += self.workers[worker].handle(message)

    def deliver_up(self, worker: WorkerId) -> None:
        message = self.up[worker].popleft()
        epoch = self.workers[worker].info.epoch
        self.handle(FromWorker(worker=worker, epoch=epoch, message=message))

    def step(self, worker: WorkerId) -> None:
        """One decode step, or the next stage of every prompt."""
        model = self.workers[worker]
        if isinstance(model, ModelDecode):
            said = model.step()
            self.pushes += model.pushes
            model.pushes.clear()
        else:
            said = []
            for attempt in list(model.readings):
                said += model.step(attempt, all(p.attempt != attempt for p in self.pushes))
            self.pushes += model.pushes
            model.pushes.clear()
        if worker in self.linked:
            self.up[worker] += said

    def land(self, index: int) -> None:
        """A write reaches the decode worker's blocks, if that process still is the one it was meant for."""
        push = self.pushes.pop(index)
        decode = self.workers.get(push.decode)
        if isinstance(decode, ModelDecode) and decode.info.epoch == push.decode_epoch:
            said = decode.push_landed(push.attempt, push.first_token, push.before)
            if push.decode in self.linked:
                self.up[push.decode] += said
        writer = self.workers.get(push.prefill)
        if isinstance(writer, ModelDecode):
            said = writer.move_landed(push.attempt)
            if push.prefill in self.linked:
                self.up[push.prefill] += said

    def reconnect(self, name: str) -> None:
        """The connection breaks, which ends what the worker ran for it, and is made again."""
        worker = WorkerId(name)
        if worker in self.linked:
            self.lose(name)
        model = self.workers[worker]
        model.connection_lost()
        self.linked.add(worker)
        self.handle(WorkerJoined(info=model.info, model=MODEL))
        if isinstance(model, ModelDecode):
            self.up[worker] += model.orphans()

    def drain(self, name: str, timeout_s: float | None = None) -> None:
        self.handle(DrainWorker(worker=WorkerId(name), timeout_s=timeout_s))

    def beat(self, worker: WorkerId) -> None:
        if worker in self.linked:
            self.up[worker].append(self.workers[worker].heartbeat())

    def run(self, rounds: int = 400) -> None:
        """Until nothing moves any more."""
        for _ in range(rounds):
            moved = bool(self.pushes)
            while self.pushes:
                self.land(0)
            for worker, model in list(self.workers.items()):
                work = (
                    model.busy or bool(model.pushes)
                    if isinstance(model, ModelDecode)
                    else bool(model.readings)
                )
                if work:
                    self.step(worker)
                moved |= work
            moved |= self.flush()
            if not moved:
                return
        raise AssertionError("the world does not come to rest")

    def run_slowly(self) -> None:
        """Each round of messages takes a second."""
        for _ in range(40):
            self.flush()
            self.now += 1.0
            for worker in list(self.workers):
                self.step(worker)
            while self.pushes:
                self.land(0)
        self.run()

    def flush(self) -> bool:
        """Deliver every message that is on its way, and those that causes."""
        moved = False
        while True:
            waiting_down = [w for w, queue in self.down.items() if queue]
            waiting_up = [w for w, queue in self.up.items() if queue]
            if not waiting_down and not waiting_up:
                return moved
            moved = True
            for worker in waiting_down:
                while self.down.get(worker):
                    self.deliver_down(worker)
            for worker in waiting_up:
                while self.up.get(worker):
                    self.deliver_up(worker)

    # --- what comes out -----------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        match action:
            case Send(worker=worker, message=message):
                self.sent.append(action)
                assert worker in self.linked, f"{message} was sent to {worker}, which is down"
                self.down[worker].append(message)
            case Emit(request=request, tokens=tokens, logprobs=logprobs):
                assert request not in self.ends, f"{request}: output after its end"
                asked = self.requests[request].sampling.logprobs is not None
                assert len(logprobs) == (len(tokens) if asked else 0)
                self.output[request] += tokens
                expected = continuation(self.requests[request].tokens, len(self.output[request]))
                assert self.output[request] == expected, f"{request}: not the tokens it would have had"
            case EmitPrompt(request=request):
                assert request not in self.ends
                self.prompt_logprobs[request] = self.prompt_logprobs.get(request, 0) + 1
            case End(request=request):
                assert request not in self.ends, f"{request}: ended twice"
                refused = type(action.outcome) is Overloaded
                assert not (refused and self.output[request]), f"{request}: refused after it had begun"
                self.ends[request] = action

    def outcome(self, name: str) -> str:
        """`stop`, `length`, or the name of an error."""
        outcome = self.ends[RequestId(name)].outcome
        return type(outcome).__name__ if isinstance(outcome, PdServeError) else outcome.value

    def assert_at_rest(self) -> None:
        """Nothing is left of anything: no request, no reservation, no load."""
        assert self.registry.num_active == 0
        assert self.registry.num_waiting == 0
        assert set(self.ends) == set(self.requests)
        for worker, model in self.workers.items():
            if worker not in self.linked:
                continue
            if isinstance(model, ModelDecode):
                assert not model.reservations, f"{worker} keeps {list(model.reservations)}"
                assert len(model.free) == model.info.num_blocks
            else:
                assert not model.readings
        for state in self.registry.fleet:
            assert not state.blocks_placed
            assert not state.prefill_left
            assert not state.unanswered
            assert state.prefill_wait_s(0) == 0.0
