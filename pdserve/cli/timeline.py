"""A request's story as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

One process per worker and one for the coordinator; spans of one thread never overlap. Times are microseconds
since the request arrived. The format is the Trace Event Format's "JSON Object Format", which Perfetto reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from pdserve.core.proto.pdserve.v1 import admin_pb2 as pb

_COORDINATOR: Final = "coordinator"
_US: Final = 1e6

Value = str | int | float
Event = dict[str, Value | dict[str, Value]]


class _Trace:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[str, str], int] = {}

    def span(self, process: str, thread: str, name: str, start_s: float, end_s: float, **args: Value) -> None:
        self._add("X", process, thread, name, start_s, args)
        self.events[-1]["dur"] = round(max(end_s - start_s, 0.0) * _US, 3)

    def moment(self, process: str, thread: str, name: str, at_s: float, **args: Value) -> None:
        self._add("i", process, thread, name, at_s, args)
        self.events[-1]["s"] = "t"

    def _add(
        self, kind: str, process: str, thread: str, name: str, at_s: float, args: dict[str, Value]
    ) -> None:
        pid, tid = self._ids(process, thread)
        at_us = round(max(at_s, 0.0) * _US, 3)
        self.events.append(
            {"ph": kind, "name": name, "cat": thread, "pid": pid, "tid": tid, "ts": at_us, "args": args}
        )

    def _ids(self, process: str, thread: str) -> tuple[int, int]:
        pid = self._processes.get(process)
        if pid is None:
            pid = self._processes[process] = len(self._processes) + 1
            self._name("process_name", pid, 0, process)
        tid = self._threads.get((process, thread))
        if tid is None:
            tid = self._threads[(process, thread)] = len(self._threads) + 1
            self._name("thread_name", pid, tid, thread)
        return pid, tid

    def _name(self, kind: str, pid: int, tid: int, name: str) -> None:
        self.events.append({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}})


def chrome_trace(story: pb.Explanation) -> str:
    """The file's text."""
    trace = _Trace()
    for phase in story.phases:
        trace.span(_COORDINATOR, "phases", phase.phase, phase.start_s, phase.end_s)
    for decision in story.decisions:
        reader = decision.prefill.worker or decision.decode.worker
        trace.moment(
            _COORDINATOR,
            "decisions",
            f"read at {reader}, write at {decision.decode.worker}",
            decision.at_s,
            why=decision.why,
            policy=decision.policy,
        )
    for note in story.notes:
        trace.moment(_COORDINATOR, "notes", note.text, note.at_s)
    for attempt in story.attempts:
        _attempt(trace, attempt)
    _outputs(trace, story)
    other = {"request": story.request, "model": story.model, "outcome": story.outcome}
    return json.dumps({"traceEvents": trace.events, "displayTimeUnit": "ms", "otherData": other}) + "\n"


def _attempt(trace: _Trace, attempt: pb.ExplainAttempt) -> None:
    name = f"attempt {attempt.attempt}"
    trace.span(
        _COORDINATOR, "attempts", name, attempt.start_s, attempt.end_s, failure=attempt.failure or "none"
    )
    reader = attempt.prefill_worker or attempt.decode_worker
    if attempt.HasField("prefill_start_s"):
        start = attempt.prefill_start_s
        if attempt.prefill_queue_s > 0:
            began = max(start - attempt.prefill_queue_s, attempt.start_s)
            trace.span(reader, "prompt", "queue", min(began, start), start)
        done = 0
        for chunk in attempt.chunks:
            label = f"chunk to {chunk.tokens_done}"
            trace.span(reader, "prompt", label, start, chunk.at_s, tokens=chunk.tokens_done - done)
            start, done = chunk.at_s, chunk.tokens_done
    if attempt.bytes_moved and attempt.HasField("prefill_end_s"):
        start = attempt.prefill_start_s if attempt.HasField("prefill_start_s") else attempt.prefill_end_s
        trace.span(
            reader,
            "transfer",
            f"KV to {attempt.decode_worker}",
            start,
            attempt.prefill_end_s + attempt.transfer_exposed_s,
            bytes=attempt.bytes_moved,
            path=attempt.transfer_path,
            busy_ms=attempt.transfer_busy_s * 1e3,
            exposed_ms=attempt.transfer_exposed_s * 1e3,
        )
    if attempt.HasField("kv_arrived_s"):
        trace.moment(attempt.decode_worker, "answer", "KV complete", attempt.kv_arrived_s)


def _outputs(trace: _Trace, story: pb.Explanation) -> None:
    """A step is the time since the output before it."""
    before: float | None = None
    for output in story.outputs:
        worker = _writer(story.attempts, output.at_s)
        if before is None:
            trace.moment(worker, "answer", "first token", output.at_s)
        else:
            trace.span(worker, "answer", "step", before, output.at_s, tokens=output.tokens)
        before = output.at_s


def _writer(attempts: Iterable[pb.ExplainAttempt], at_s: float) -> str:
    """Whose attempt it was."""
    name = _COORDINATOR
    for attempt in attempts:
        if attempt.start_s <= at_s:
            name = attempt.decode_worker
    return name
