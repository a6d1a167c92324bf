"""The gRPC edge: `pdserve.v1.Generation`. Bad input is answered here and reaches no worker.

Work per request happens on the event loop, but for tokenising long prompts. Work per token is one batch: what
the workers sent since the last write becomes one delta.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, NoReturn

import grpc
from google.protobuf.message import DecodeError

from coordinator import auth, validation
from coordinator.answer import RequestAnswer
from coordinator.dispatcher import Dispatcher
from coordinator.events import NewRequest
from coordinator.metrics import Metrics
from coordinator.models import LoadedModel
from coordinator.whole import WholeAnswer
from coordinator.wire import status_of
from pdserve.core.errors import InvalidRequest, PdServeError
from pdserve.core.messages import Role
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sampling import SamplingLimits
from pdserve.core.sla_settings import SlaClassSettings

log = logging.getLogger(__name__)

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Generation"].full_name
LONG_PROMPT_CHARS: Final = 2048
"""Text longer than this is tokenised off the event loop: about a millisecond's work."""

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateDelta]


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no request, such as text that is not UTF-8."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    default_max_tokens: int
    default_timeout_s: float
    max_attempts: int
    limits: SamplingLimits
    classes: Mapping[str, SlaClassSettings]
    default_class: str | None


class Gateway:
    def __init__(
        self,
        dispatcher: Dispatcher,
        models: Mapping[str, LoadedModel],
        settings: GatewaySettings,
        metrics: Metrics,
        tokenisers: Executor,
    ) -> None:
        self._dispatcher, self._models = dispatcher, models
        self._settings, self._metrics, self._tokenisers = settings, metrics, tokenisers
        # Above those of a coordinator before us: a worker may still hold blocks for a write of its attempts.
        self._epochs = itertools.count(time.time_ns() // 1000, settings.max_attempts)

    def handler(self) -> grpc.GenericRpcHandler[object, object]:
        """The service, for a grpc.aio server."""
        methods = {
            "Generate": grpc.unary_unary_rpc_method_handler(
                self.generate, _parse, pb.GenerateResponse.SerializeToString
            ),
            "GenerateStream": grpc.unary_stream_rpc_method_handler(
                self.generate_stream, _parse, pb.GenerateDelta.SerializeToString
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self.list_models, pb.ListModelsRequest.FromString, pb.ListModelsResponse.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    # --- the methods --------------------------------------------------------------------------------

    async def generate_stream(self, request: pb.GenerateRequest | Malformed, context: Context) -> None:
        try:
            async with aclosing(self._answer(request, context)) as deltas:
                async for delta in deltas:
                    await context.write(delta)
        except PdServeError as error:
            await self._abort(context, error)

    async def generate(
        self, request: pb.GenerateRequest | Malformed, context: Context
    ) -> pb.GenerateResponse:
        whole = WholeAnswer()
        try:
            async with aclosing(self._answer(request, context)) as deltas:
                async for delta in deltas:
                    whole.add(delta)
        except PdServeError as error:
            await self._abort(context, error)
        return whole.response(model=self._name_of(request))

    async def list_models(self, _request: pb.ListModelsRequest, _context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=map(self._card, self._distinct()))

    # --- one request --------------------------------------------------------------------------------

    async def _answer(
        self, request: pb.GenerateRequest | Malformed, context: Context
    ) -> AsyncGenerator[pb.GenerateDelta]:
        """Deltas to the end. Leaving early, for whatever reason, cancels the request at its workers."""
        model, samples = await self._admit(request, context)
        response_id = samples[0].id if len(samples) == 1 else samples[0].id.rpartition(".")[0]
        answer = RequestAnswer(samples, model, response_id=response_id)
        stream = self._dispatcher.submit(samples)
        try:
            while not answer.done:
                deltas, stopped = answer.read(await stream.take())
                for sample in stopped:
                    self._dispatcher.stop_matched(sample)
                for delta in deltas:
                    yield delta
        finally:
            self._dispatcher.cancel(samples, "the client went away")

    async def _admit(
        self, request: pb.GenerateRequest | Malformed, context: Context
    ) -> tuple[LoadedModel, tuple[NewRequest, ...]]:
        """Raises `InvalidRequest`, `ModelNotFound`, or `PermissionDenied` for another's tenant."""
        arrival, arrived = time.time(), self._dispatcher.now()
        if isinstance(request, Malformed):
            raise InvalidRequest(field="message", value=request.why, limit="a GenerateRequest, text as UTF-8")
        request.tenant = auth.tenant_of(request.tenant)
        settings = self._settings
        checked = validation.check(
            request,
            self._models,
            limits=settings.limits,
            default_max_tokens=settings.default_max_tokens,
            classes=settings.classes,
            default_class=settings.default_class,
        )
        timeouts = [settings.default_timeout_s, checked.contract.deadline_s, context.time_remaining()]
        timeout_s = min(timeout for timeout in timeouts if timeout is not None)
        samples = validation.samples(
            checked,
            await self._tokenise(request, checked.model),
            max_model_len=self._max_model_len(checked.model),
            arrival=arrival,
            arrived=arrived,
            deadline=arrived + timeout_s,
            first_epoch=next(self._epochs) if checked.client_chose_id else 0,
        )
        traceparent = _traceparent(context)
        if traceparent:
            samples = tuple(dataclasses.replace(sample, traceparent=traceparent) for sample in samples)
        for sample in samples:
            if self._dispatcher.registry.is_active(sample.id):
                limit = "an id that no running request has"
                raise InvalidRequest(field="request_id", value=checked.id, limit=limit)
        self._metrics.tokenise.labels(checked.model.served.name).observe(self._dispatcher.now() - arrived)
        return checked.model, samples

    async def _tokenise(self, request: pb.GenerateRequest, model: LoadedModel) -> list[int]:
        if validation.prompt_chars(request) <= LONG_PROMPT_CHARS:
            return validation.tokenise(request, model)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenisers, validation.tokenise, request, model)

    def _max_model_len(self, model: LoadedModel) -> int:
        """What every worker can do; they may have less room than the model."""
        name = model.served.name
        workers = [w.info.max_model_len for w in self._dispatcher.registry.fleet if w.model == name]
        return min([model.served.max_model_len, *workers])

    def _name_of(self, request: pb.GenerateRequest | Malformed) -> str:
        """The model that answered; a client may leave its name out."""
        asked = "" if isinstance(request, Malformed) else request.model
        return validation.find_model(asked, self._models).served.name

    def _distinct(self) -> list[LoadedModel]:
        """Each model once, whatever the number of its names."""
        return [model for name, model in self._models.items() if name == model.served.name]

    def _card(self, model: LoadedModel) -> pb.ModelCard:
        name, fleet = model.served.name, self._dispatcher.registry.fleet
        decoders = fleet.of(name, Role.DECODE)
        return pb.ModelCard(
            name=name,
            max_model_len=self._max_model_len(model),
            vocab_size=model.served.vocab_size,
            has_chat_template=model.tokenizer.has_chat_template,
            prefill_workers=len(fleet.of(name, Role.PREFILL)),
            decode_workers=len(decoders),
            ready=any(worker.takes_decode() for worker in decoders),
            aliases=model.served.aliases,
            sla_classes=sorted(self._settings.classes.keys() | model.served.classes.keys()),
        )

    async def _abort(self, context: Context, error: PdServeError) -> NoReturn:
        self._metrics.errors.labels(type(error).__name__).inc()
        code, details, metadata = status_of(error)
        await context.abort(code, details, metadata)
        raise AssertionError("abort raises")


def _traceparent(context: Context) -> str:
    """W3C trace context of the call; empty without."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""


def _parse(data: bytes) -> pb.GenerateRequest | Malformed:
    """gRPC would answer INTERNAL for bytes that do not parse; they are the client's mistake."""
    try:
        return pb.GenerateRequest.FromString(data)
    except DecodeError as error:
        return Malformed(str(error))
