"""The operators' gRPC service: `pdserve.v1.Admin`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import grpc

from coordinator.dispatcher import Dispatcher
from coordinator.events import DrainWorker, UndrainWorker
from coordinator.explain import explanation
from coordinator.fleet import WorkerState
from coordinator.planner.control import PlannerControl
from coordinator.planner.proposal import Proposal, Split, change_in_words
from coordinator.planner.resizing import Resizing, WorkerChange, changing_roles, in_use
from coordinator.wire import status_of
from pdserve.core.errors import ConfigError, InvalidRequest, PdServeError, RequestNotFound, WorkerLost
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.operation_settings import PlannerMode
from pdserve.core.proto.pdserve.v1 import admin_pb2 as pb

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Admin"].full_name

Context = grpc.aio.ServicerContext[pb.DrainRequest, pb.DrainStatus]


ScaleContext = grpc.aio.ServicerContext[pb.ScaleRequest, pb.ScaleStatus]


def change_message(change: WorkerChange) -> pb.WorkerChange:
    return pb.WorkerChange(
        worker=change.worker, role=change.role.value, state=change.state.value, text=change.text
    )


def proposal_message(proposal: Proposal, changes: Sequence[WorkerChange] = ()) -> pb.PlanProposal:
    return pb.PlanProposal(
        model=proposal.model,
        standing=proposal.standing.value,
        prefill=proposal.now.prefill,
        decode=proposal.now.decode,
        wanted_prefill=proposal.wanted.prefill,
        wanted_decode=proposal.wanted.decode,
        change=change_in_words(proposal.change),
        gain=proposal.gain,
        uncertainty=proposal.uncertainty,
        rate=proposal.rate,
        capacity=proposal.capacity,
        wanted_capacity=proposal.wanted_capacity,
        reason=proposal.reason,
        changes=[change_message(change) for change in changes],
    )


class Admin:
    def __init__(
        self,
        dispatcher: Dispatcher,
        plans: PlannerControl | None = None,
        resizing: Resizing | None = None,
    ) -> None:
        """resizing: how workers are added and retired; None: nobody starts any."""
        self._dispatcher, self._plans, self._resizing = dispatcher, plans, resizing

    def handler(self) -> grpc.GenericRpcHandler[object, object]:
        """The service, for a grpc.aio server."""
        drain = grpc.unary_stream_rpc_method_handler(
            self.drain, pb.DrainRequest.FromString, pb.DrainStatus.SerializeToString
        )
        explain = grpc.unary_unary_rpc_method_handler(
            self.explain, pb.ExplainRequest.FromString, pb.Explanation.SerializeToString
        )
        undrain = grpc.unary_unary_rpc_method_handler(
            self.undrain, pb.UndrainRequest.FromString, pb.UndrainResponse.SerializeToString
        )
        plan = grpc.unary_unary_rpc_method_handler(
            self.plan, pb.PlanRequest.FromString, pb.Plans.SerializeToString
        )
        scale = grpc.unary_stream_rpc_method_handler(
            self.scale, pb.ScaleRequest.FromString, pb.ScaleStatus.SerializeToString
        )
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {"Drain": drain, "Undrain": undrain, "Explain": explain, "Plan": plan, "Scale": scale},
        )

    async def plan(
        self, request: pb.PlanRequest, context: grpc.aio.ServicerContext[pb.PlanRequest, pb.Plans]
    ) -> pb.Plans:
        if self._plans is None:
            return pb.Plans(mode=PlannerMode.OFF.value)
        resizing = self._resizing
        proposals = [
            proposal_message(proposal, () if resizing is None else resizing.changes(proposal.model))
            for proposal in self._plans.proposals()
        ]
        return pb.Plans(mode=self._plans.mode.value, proposals=proposals)

    async def explain(
        self, request: pb.ExplainRequest, context: grpc.aio.ServicerContext[pb.ExplainRequest, pb.Explanation]
    ) -> pb.Explanation:
        registry = self._dispatcher.registry
        found = registry.story(RequestId(request.request) if request.request else None)
        if found is None:
            code, details, metadata = status_of(RequestNotFound(request.request, registry.num_remembered))
            await context.abort(code, details, metadata)
        story, decisions = found
        running = registry.current_attempt(story.request.id)
        return explanation(story, decisions, running, now=self._dispatcher.now())

    async def scale(self, request: pb.ScaleRequest, context: ScaleContext) -> None:
        try:
            await self._scale(request, context)
        except PdServeError as error:
            code, details, metadata = status_of(error)
            await context.abort(code, details, metadata)

    async def _scale(self, request: pb.ScaleRequest, context: ScaleContext) -> None:
        resizing, fleet = self._resizing, self._dispatcher.registry.fleet
        if resizing is None:
            raise ConfigError("nobody starts workers for this coordinator: pdserve serve does")
        model = resizing.model_named(request.model)
        now = in_use(fleet, model)
        wanted = Split(
            request.prefill if request.HasField("prefill") else now.prefill,
            request.decode if request.HasField("decode") else now.decode,
        )
        before = set(resizing.changes(model))
        for event in resizing.resize(fleet, model, wanted):
            self._dispatcher.handle(event)
        told: pb.ScaleStatus | None = None
        while True:
            split = in_use(fleet, model)
            changes = [change_message(c) for c in resizing.changes(model) if c not in before]
            done = not resizing.busy(model) and not changing_roles(fleet, model)
            status = pb.ScaleStatus(prefill=split.prefill, decode=split.decode, changes=changes, done=done)
            if status != told:
                await context.write(status)
                told = status
            if done:
                return
            await self._dispatcher.ticked()

    async def drain(self, request: pb.DrainRequest, context: Context) -> None:
        try:
            await self._drain(request, context)
        except PdServeError as error:
            code, details, metadata = status_of(error)
            await context.abort(code, details, metadata)

    async def undrain(
        self,
        request: pb.UndrainRequest,
        context: grpc.aio.ServicerContext[pb.UndrainRequest, pb.UndrainResponse],
    ) -> pb.UndrainResponse:
        try:
            state = self._find(request.worker)
            self._dispatcher.handle(UndrainWorker(worker=state.id))
        except PdServeError as error:
            code, details, metadata = status_of(error)
            await context.abort(code, details, metadata)
        return pb.UndrainResponse()

    async def _drain(self, request: pb.DrainRequest, context: Context) -> None:
        state = self._find(request.worker)
        timeout_s = request.timeout_s if request.HasField("timeout_s") else None
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s >= 0):
            raise InvalidRequest(field="timeout_s", value=timeout_s, limit="0 or more seconds")
        self._dispatcher.handle(DrainWorker(worker=state.id, timeout_s=timeout_s))
        asked_at, told = state.num_heard, -1
        while True:
            # Its own counts are worth something once it has heard of the drain.
            left = self._left(state, counts_hold=state.num_heard > asked_at + 1)
            if left != told:
                await context.write(pb.DrainStatus(requests_left=left, drained=left == 0))
                told = left
            if left == 0:
                return
            await self._dispatcher.ticked()

    def _find(self, name: str) -> WorkerState:
        fleet = self._dispatcher.registry.fleet
        state = fleet.up(WorkerId(name))
        if state is None:
            known = ", ".join(sorted(worker.id for worker in fleet if worker.up)) or "none is up"
            raise InvalidRequest(field="worker", value=name, limit=f"a worker that is up: {known}")
        return state

    def _left(self, state: WorkerState, *, counts_hold: bool) -> int:
        """Attempts placed there, or what it says itself that it holds."""
        if self._dispatcher.registry.fleet.up(state.id, state.info.epoch) is not state:
            raise WorkerLost(state.id, "it went away while it was drained")
        placed = len(state.blocks_placed.keys() | state.prefill_left.keys())
        beat = state.heartbeat
        if not counts_hold or beat is None:
            return max(placed, 1)
        held = beat.blocks.held + beat.blocks.quarantined
        return max(placed, beat.running + beat.waiting, min(held, 1))
