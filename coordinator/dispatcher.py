"""Performs what the registry decides: sends to workers, feeds streams, keeps time. All on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol, get_args

from coordinator.events import (
    Action,
    Broken,
    ClientCancelled,
    Emit,
    EmitPrompt,
    End,
    Event,
    FromWorker,
    NewRequest,
    Output,
    Send,
    StopMatched,
    Submit,
    Tick,
    WorkerDown,
    WorkerGone,
    WorkerJoined,
)
from coordinator.fleet import Fleet
from coordinator.metrics import Metrics
from coordinator.registry import TICK_S, Registry
from coordinator.report import Report
from coordinator.request_log import log_accepted, log_end, log_placed
from coordinator.streams import RequestStream
from coordinator.tracing import RequestTracer
from coordinator.workers import WorkerLink
from pdserve.core.channel import Channel
from pdserve.core.errors import PdServeError, WorkerLost
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.logs import about
from pdserve.core.messages import (
    FinishReason,
    Heartbeat,
    Hello,
    Message,
    Refused,
    RoleChanged,
    StartDecode,
    Up,
    WorkerInfo,
)
from pdserve.core.worker_state import PrefixEvents

log = logging.getLogger(__name__)

_UP: Final = get_args(Up)


class Watcher(Protocol):
    """Told what passes through a dispatcher; may want something done when time has passed."""

    def arrived(self, samples: Sequence[NewRequest], now: float) -> None: ...

    def ended(self, report: Report, outcome: FinishReason | PdServeError, now: float) -> None: ...

    def ticked(self, fleet: Fleet, now: float) -> Sequence[Event]: ...


class Dispatcher:
    """Times are those of the running loop's clock, which is monotonic."""

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        *,
        heartbeat_timeout_s: float,
        step_timeout_s: float,
        tracer: RequestTracer | None = None,
        watchers: Sequence[Watcher] = (),
        on_workers_changed: Callable[[], None],
        on_connection_lost: Callable[[WorkerInfo], None],
    ) -> None:
        """on_connection_lost: the worker was not silent, and its process may well live."""
        self.registry: Final = registry
        self._metrics, self._tracer, self._watchers = metrics, tracer, tuple(watchers)
        self._heartbeat_timeout_s, self._step_timeout_s = heartbeat_timeout_s, step_timeout_s
        self._on_connection_lost = on_connection_lost
        self._ticked = asyncio.Event()
        self._on_workers_changed = on_workers_changed
        self._links: dict[WorkerId, WorkerLink] = {}
        self._streams: dict[RequestId, RequestStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self._tick_s = min(TICK_S, heartbeat_timeout_s / 4)
        self._set_timer(self._loop.time() + self._tick_s)

    def now(self) -> float:
        return self._loop.time()

    # --- for the gateway ----------------------------------------------------------------------------

    def submit(self, samples: tuple[NewRequest, ...]) -> RequestStream:
        """Start a request; none of its sample ids may be active."""
        stream = RequestStream(samples)
        for sample in samples:
            self._streams[sample.id] = stream
            log_accepted(sample)
        self._idle.clear()
        for watcher in self._watchers:
            watcher.arrived(samples, self.now())
        self.handle(Submit(samples=samples))
        self._arm()
        return stream

    def cancel(self, samples: Sequence[NewRequest], reason: str) -> None:
        """End what is still active of them; nobody reads their stream any more."""
        for sample in samples:
            self._streams.pop(sample.id, None)
            if self.registry.is_active(sample.id):
                self.handle(ClientCancelled(request=sample.id, reason=reason))

    def stop_matched(self, request: RequestId) -> None:
        self.handle(StopMatched(request=request))

    # --- workers ------------------------------------------------------------------------------------

    def worker_joined(self, channel: Channel, info: WorkerInfo, model: str, rest: Sequence[Message]) -> None:
        old = self._links.pop(info.worker, None)
        if old is not None:
            old.abort()
        link = WorkerLink(channel, info, now=self.now(), on_batch=self._received, on_end=self._link_ended)
        self._links[info.worker] = link
        self.handle(WorkerJoined(info=info, model=model))
        self._received(link, rest)
        log.info("%s worker %s joined, epoch %d", info.role.value, info.worker, info.epoch)
        self._on_workers_changed()

    def worker_gone(self, worker: WorkerId, why: str) -> None:
        """Its process has ended for certain."""
        link = self._links.pop(worker, None)
        if link is not None:
            link.abort()
        state = self.registry.fleet.get(worker)
        if state is not None:
            self.handle(WorkerGone(worker=worker, epoch=state.info.epoch, why=why))
            log.info("worker %s is gone: %s", worker, why)
            self._on_workers_changed()

    def _received(self, link: WorkerLink, batch: Sequence[Message]) -> None:
        now = self._loop.time()  # of the whole frame: its messages are of one step
        for message in batch:
            if not isinstance(message, _UP):
                self._disconnected(
                    link, f"it sent a {type(message).__name__}, which is not a worker's to send"
                )
                return
            if isinstance(message, Heartbeat) and message.step_age_s > self._step_timeout_s:
                self._disconnected(link, f"it hangs: a step has lasted {message.step_age_s:.1f} s")
                return
            if isinstance(message, Refused):
                self._metrics.refusals.labels(link.info.worker, message.reason.value).inc()
            self.handle(FromWorker(worker=link.info.worker, epoch=link.info.epoch, message=message), now)

    def _link_ended(self, link: WorkerLink, why: str) -> None:
        known = self._links.get(link.info.worker) is link
        self._disconnected(link, why)
        if known:
            self._on_connection_lost(link.info)

    def _disconnected(self, link: WorkerLink, why: str) -> None:
        link.abort()
        worker, epoch = link.info.worker, link.info.epoch
        if self._links.get(worker) is link:
            del self._links[worker]
            state = self.registry.fleet.get(worker)
            placed = state.num_placed if state is not None else 0
            log.warning("worker %s is down: %s; %d requests of it begin again", worker, why, placed)
            self.handle(WorkerDown(worker=worker, epoch=epoch, why=why))
            self._on_workers_changed()

    # --- the registry's hands -----------------------------------------------------------------------

    def handle(self, event: Event, now: float | None = None) -> None:
        """now: when it came, for events that came together; by default, this moment."""
        now = self._loop.time() if now is None else now
        try:
            actions = self.registry.handle(event, now)
        except PdServeError as error:
            # Our own bug (an illegal transition, say). It costs the one request its answer, nobody else's.
            request = _request_of(event)
            log.exception("handling %s failed", type(event).__name__, extra=about(request))
            if request is None:
                raise
            actions = self.registry.handle(Broken(request=request, error=error), now)
        for action in actions:
            self._perform(action)

    def _perform(self, action: Action) -> None:
        if isinstance(action, Send):
            link = self._links.get(action.worker)
            if isinstance(action.message, StartDecode):
                log_placed(action.message, action.worker)
            if link is not None:
                link.send(action.message)
            return
        self._observe(action)
        if isinstance(action, End):
            stream = self._streams.pop(action.request, None)
            if not self.registry.num_active:
                self._idle.set()
        else:
            stream = self._streams.get(action.request)
        if stream is not None:
            stream.feed(action)

    def _observe(self, output: Output) -> None:
        match output:
            case Emit(gap_s=float(gap_s), tokens=tokens, request=request):
                stream = self._streams.get(request)
                if stream is not None:
                    self._metrics.gap(stream.samples[0].model, gap_s, len(tokens))
            case End(report=report, outcome=outcome):
                charged = self._metrics.ended(report, outcome)
                log_end(report, outcome, charged)
                for watcher in self._watchers:
                    watcher.ended(report, outcome, self.now())
                if self._tracer is not None:
                    epoch_ns = time.time_ns() - int(self._loop.time() * 1e9)
                    self._tracer.ended(report, outcome, epoch_ns=epoch_ns)
            case Emit() | EmitPrompt():
                pass

    # --- time ---------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Whatever goes wrong in one, the next one comes: nothing else sees deadlines, leases and silence."""
        due = self._loop.time() + self._tick_s
        try:
            self._look_around()
            due = self._next_tick()
        finally:
            self._set_timer(due)
            ticked, self._ticked = self._ticked, asyncio.Event()
            ticked.set()

    def _look_around(self) -> None:
        now = self._loop.time()
        self._drop_silent(now, late_s=now - self._due)
        self.handle(Tick())
        for watcher in self._watchers:
            for event in watcher.ticked(self.registry.fleet, now):
                self.handle(event)
        self._metrics.loop_lag.set(max(now - self._due, 0.0))
        self._metrics.observe_fleet(self.registry.fleet)
        self._metrics.observe_requests(self.registry.phases(), self.registry.num_waiting)
        self._metrics.observe_fetches(self.registry.fetched)

    async def ticked(self) -> None:
        """Wait for the next tick: a quarter of a second at most."""
        await self._ticked.wait()

    def _set_timer(self, due: float) -> None:
        # Remembered here: uvloop's handle of a call that is due at once has no when().
        self._due = due
        self._timer: asyncio.Handle = self._loop.call_at(due, self._tick)

    def _arm(self) -> None:
        """Tick earlier, where a new request wants it."""
        wanted = self._next_tick()
        if wanted < self._due:
            self._timer.cancel()
            self._set_timer(wanted)

    def _next_tick(self) -> float:
        now = self._loop.time()
        return min(self.registry.next_tick(now), now + self._tick_s)

    def _drop_silent(self, now: float, *, late_s: float) -> None:
        for link in list(self._links.values()):
            if late_s > self._heartbeat_timeout_s / 2:
                # This loop was held up, not the workers: hear first what they sent meanwhile.
                link.last_heard = now
            silent_s = now - link.last_heard
            if silent_s > self._heartbeat_timeout_s:
                self._disconnected(link, f"no sign of life for {silent_s:.1f} s")

    async def stop(self, grace_s: float) -> None:
        """Let requests finish for `grace_s`, end the rest as cancelled, close the connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        for request in list(self._streams):
            self.handle(Broken(request=request, error=WorkerLost("coordinator", "it is stopping")))
        self._timer.cancel()
        links = list(self._links.values())
        self._links.clear()
        await asyncio.gather(*(link.close() for link in links))


def _request_of(event: Event) -> RequestId | None:
    match event:
        case FromWorker(message=message):
            if isinstance(message, (Heartbeat, Hello, PrefixEvents, WorkerInfo, RoleChanged)):
                return None
            return message.attempt.request
        case ClientCancelled(request=request) | StopMatched(request=request) | Broken(request=request):
            return request
        case _:
            return None
