"""The story of a request on the wire: what `pdserve explain` shows. Times are seconds since it arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from coordinator.account import Leg
from coordinator.decisions import Choice, Decision, Route
from coordinator.flight import Attempt
from coordinator.stories import Elsewhere, Story
from coordinator.wire import timings
from pdserve.core.errors import PdServeError
from pdserve.core.ids import WorkerId
from pdserve.core.lifecycle import TERMINAL
from pdserve.core.proto.pdserve.v1 import admin_pb2 as pb

_CANDIDATES: Final = 8


def explanation(
    story: Story, decisions: Sequence[Decision], running: Attempt | None, *, now: float
) -> pb.Explanation:
    """running: its attempt, where it has not ended. Attempts are counted from 0."""
    request, began, first = story.request, story.history[0][0], story.request.first_epoch
    wire = pb.Explanation(
        request=request.id,
        model=request.model,
        tenant=request.tenant,
        sla_class=request.sla_class,
        priority=request.priority,
        arrival=request.arrival,
        prompt_tokens=story.prompt_tokens,
        max_tokens=request.sampling.max_tokens,
        output_tokens=sum(story.output_tokens) if story.report is None else story.report.output_tokens,
        ttft_target_s=request.ttft_target_s,
        tpot_target_s=request.tpot_target_s,
        deadline_s=request.deadline - request.arrived,
        notes=[pb.ExplainNote(at_s=note.at - began, text=note.text) for note in story.notes],
        phases=_phases(story, began, now),
        outputs=[
            pb.ExplainOutput(at_s=at - began, tokens=tokens)
            for at, tokens in zip(story.output_at, story.output_tokens, strict=True)
        ],
        outputs_left_out=story.outputs_left_out,
        attempts=[_attempt(leg, began, leg.attempt.epoch - first) for leg in story.legs],
    )
    # Older decisions than are kept have lost their predictions too: the last ones belong together.
    predicted = [*[{}] * (len(decisions) - len(story.elsewhere)), *story.elsewhere]
    for decision, elsewhere in zip(decisions, predicted[-len(decisions) :] if decisions else (), strict=True):
        wire.decisions.append(_decision(decision, elsewhere, began, decision.attempt - first))
    if story.report is not None and story.report.prefill_s is not None:
        _begin_of_prompt(wire, story.report.prefill_s)
    if running is not None and story.report is None:
        wire.attempts.append(_running(running, began, now, running.id.epoch - first))
    if story.report is not None:
        wire.timings.CopyFrom(timings(story.report))
    outcome = story.outcome
    if outcome is not None:
        failed = isinstance(outcome, PdServeError)
        wire.outcome = type(outcome).__name__ if failed else outcome.value  # type: ignore[union-attr]  # narrowed
        wire.error = str(outcome) if failed else ""
    return wire


def _begin_of_prompt(wire: pb.Explanation, prefill_s: float) -> None:
    """A worker tells that it began with the first chunk when that is done: computing began before."""
    for attempt in reversed(wire.attempts):
        if attempt.HasField("prefill_end_s"):
            began = max(attempt.prefill_end_s - prefill_s, attempt.start_s)
            attempt.prefill_start_s = min(attempt.prefill_start_s, began)
            return


def _phases(story: Story, began: float, now: float) -> Iterator[pb.ExplainPhase]:
    ends = [at for at, _ in story.history[1:]] + [now]
    for (start, phase), end in zip(story.history, ends, strict=True):
        if phase not in TERMINAL:
            yield pb.ExplainPhase(phase=phase.value, start_s=start - began, end_s=end - began)


def _decision(
    decision: Decision, elsewhere: Mapping[WorkerId, Elsewhere], began: float, attempt: int
) -> pb.ExplainDecision:
    placement = decision.placement
    return pb.ExplainDecision(
        at_s=decision.at - began,
        attempt=attempt,
        policy=decision.policy,
        tokens=decision.tokens,
        decode=_choice(placement.decode, elsewhere),
        prefill=None if placement.prefill is None else _choice(placement.prefill, elsewhere),
        routes=map(_route, placement.routes),
        rejected=[pb.ExplainRejected(worker=r.worker, why=r.why) for r in placement.rejected],
        why=placement.why,
    )


def _choice(choice: Choice, elsewhere: Mapping[WorkerId, Elsewhere]) -> pb.ExplainChoice:
    ranked = sorted(choice.candidates, key=lambda c: (c.worker != choice.worker, c.score, c.worker))
    shown = ranked[:_CANDIDATES]
    nothing = Elsewhere(None, None)
    return pb.ExplainChoice(
        worker=choice.worker,
        reason=choice.reason,
        candidates=[
            pb.ExplainCandidate(
                worker=c.worker,
                score=c.score,
                violation=c.violation,
                load=c.load,
                prefix_tokens=c.prefix_tokens,
                transfer_s=c.transfer_s,
                ttft_s=elsewhere.get(c.worker, nothing).ttft_s,
                tpot_s=elsewhere.get(c.worker, nothing).tpot_s,
            )
            for c in shown
        ],
        candidates_left_out=len(ranked) - len(shown),
    )


def _route(route: Route) -> pb.ExplainRoute:
    return pb.ExplainRoute(
        prefill=route.prefill or "",
        decode=route.decode,
        ttft_s=route.ttft_s,
        ttft_std_s=route.ttft_std_s,
        tpot_s=route.tpot_s,
        tpot_std_s=route.tpot_std_s,
        exposed_s=route.exposed_s,
        others_s=route.others_s,
        violation=route.violation,
        cost=route.cost,
    )


def _attempt(leg: Leg, began: float, number: int) -> pb.ExplainAttempt:
    transfer = leg.transfer
    return pb.ExplainAttempt(
        attempt=number,
        prefill_worker=leg.prefill_worker,
        decode_worker=leg.decode_worker,
        start_s=leg.placed_at - began,
        end_s=leg.ended_at - began,
        reserved_s=_since(leg.reserved_at, began),
        prefill_start_s=_since(leg.prefill_began, began),
        prefill_end_s=_since(leg.prefill_ended, began),
        chunks=[pb.ExplainChunk(at_s=at - began, tokens_done=done) for at, done in leg.chunks],
        kv_arrived_s=_since(leg.arrived_at, began),
        bytes_moved=0 if transfer is None else transfer.bytes_moved,
        transfer_path="" if transfer is None else transfer.path,
        transfer_exposed_s=0.0 if transfer is None else transfer.exposed_s,
        transfer_busy_s=0.0 if transfer is None else transfer.busy_s,
        cached_tokens=leg.cached_tokens,
        output_tokens=leg.output_tokens,
        prefill_queue_s=leg.prefill_queue_s,
        failure=leg.failure,
    )


def _running(attempt: Attempt, began: float, now: float, number: int) -> pb.ExplainAttempt:
    marks = attempt.marks
    first = marks.prefill_began if marks.prefill_began is not None else now
    return pb.ExplainAttempt(
        attempt=number,
        prefill_worker=attempt.prefill or "",
        decode_worker=attempt.decode,
        start_s=first - began,
        end_s=now - began,
        prefill_start_s=_since(marks.prefill_began, began),
        prefill_end_s=_since(marks.prefill_ended, began),
        chunks=[pb.ExplainChunk(at_s=at - began, tokens_done=done) for at, done in marks.chunks],
        kv_arrived_s=_since(marks.arrived, began),
        cached_tokens=attempt.cached_tokens,
        prefill_queue_s=attempt.prefill_queue_s,
    )


def _since(at: float | None, began: float) -> float | None:
    return None if at is None else at - began
