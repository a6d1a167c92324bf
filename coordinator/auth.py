"""The gRPC edge asks who is there before anything else is done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import grpc

from coordinator.keys import ApiKeys, Caller, Scope
from coordinator.wire import status_of
from pdserve.core.errors import PdServeError, PermissionDenied

_CALLER: Final[ContextVar[Caller | None]] = ContextVar("caller", default=None)
"""Of the call that a task serves."""

OPEN: Final = frozenset({"grpc.health.v1.Health"})
"""Services that anybody may ask: probes carry no key."""
BEARER: Final = "bearer "

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


def current_caller() -> Caller | None:
    """Who sent the request being served; None where the service wants no keys."""
    return _CALLER.get()


def tenant_of(asked: str) -> str:
    """Whose a request is: its key's tenant, or whom it names where the key is nobody's in particular.

    Raises `PermissionDenied` when it names another than its key's.
    """
    caller = current_caller()
    if caller is None or caller.tenant is None:
        return asked
    if asked not in ("", caller.tenant):
        raise PermissionDenied(f"tenant: the key of {caller.name} is {caller.tenant}'s, not {asked}'s")
    return caller.tenant


class Authenticate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Lets a call through when its key allows it."""

    def __init__(self, keys: ApiKeys, scopes: Mapping[str, Scope]) -> None:
        """scopes: what a method (`/service/Method`) or service (`service`) wants; others want ADMIN."""
        self._keys, self._scopes = keys, dict(scopes)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        service = method.rpartition("/")[0].lstrip("/")
        if handler is None or service in OPEN:
            return handler
        try:
            caller = self._keys.caller(_key_in(handler_call_details.invocation_metadata or ()))
            caller.require(self._scopes.get(method) or self._scopes.get(service) or Scope.ADMIN)
        except PdServeError as error:
            return _refusing(handler, error)
        _CALLER.set(caller)
        return handler


def _key_in(metadata: Any) -> str | None:
    for name, value in metadata:
        if name == "authorization" and isinstance(value, str) and value[: len(BEARER)].lower() == BEARER:
            return value[len(BEARER) :].strip()
    return None


def _refusing(handler: Handler, error: PdServeError) -> Handler:
    """A handler of the same shape that answers with the error."""
    code, details, metadata = status_of(error)

    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(code, details, metadata)

    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(refuse, handler.request_deserializer, handler.response_serializer)
