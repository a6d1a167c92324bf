"""The console's web server: three static files, what goes on as JSON, and actions for those who may.

Whoever acts sends an API key in a header of every request, which no foreign page can make a browser do: there
are no cookies to ride on. Without keys in the service nothing can be changed from here, and a browser that is
made to read the page under another name (DNS rebinding) is turned away by its Host header.
"""

from __future__ import annotations

import ipaddress
import json
import ssl
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Final

from aiohttp import web
from google.protobuf.json_format import MessageToDict

from coordinator.console.state import Rights, state
from coordinator.console.watch import ConsoleWatch
from coordinator.dispatcher import Dispatcher
from coordinator.events import ChangeWorkerRole, DrainWorker, Event, UndrainWorker
from coordinator.explain import explanation
from coordinator.keys import ApiKeys, Scope
from coordinator.planner.proposal import Proposal
from pdserve.core.errors import (
    ConfigError,
    InvalidRequest,
    PdServeError,
    PermissionDenied,
    RequestNotFound,
    Unauthenticated,
)
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import Role

_PAGES: Final = {"/": ("index.html", "text/html"), "/console.js": ("console.js", "text/javascript")} | {
    "/console.css": ("console.css", "text/css")
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_STATUS: Final[dict[type[PdServeError], int]] = {
    Unauthenticated: 401,
    PermissionDenied: 403,
    RequestNotFound: 404,
    InvalidRequest: 400,
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Console:
    """`start` on the event loop of the dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        watch: ConsoleWatch,
        keys: ApiKeys | None,
        proposals: Callable[[], Sequence[Proposal]],
        stands_by: Callable[[WorkerId], bool],
    ) -> None:
        self._dispatcher, self._watch, self._keys, self._proposals = dispatcher, watch, keys, proposals
        self._stands_by = stands_by
        folder = files("coordinator.console") / "page"
        self._pages = {path: ((folder / name).read_text(), kind) for path, (name, kind) in _PAGES.items()}
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        """Listen; returns the port. Raises `ConfigError` when it is taken."""
        app = web.Application(middlewares=[self._guard])
        for path in self._pages:
            app.router.add_get(path, self._page)
        app.router.add_get("/api/state", self._state)
        app.router.add_get("/api/requests/{request}", self._request)
        app.router.add_post("/api/workers/{worker}/{action}", self._act)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls, reuse_port=False)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                f"coordinator.console_port: cannot listen on {host}:{port}: {error.strerror}"
            ) from error
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    # --- who may ------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check(request)
            response = await handler(request)
        except PdServeError as error:
            status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
            response = web.json_response({"error": str(error)}, status=status)
        except web.HTTPException as error:
            response = web.json_response({"error": error.reason}, status=error.status)
        response.headers.update(_HEADERS)
        return response

    def _check(self, request: web.Request) -> None:
        if request.path in self._pages:
            return
        acting = request.method != "GET"
        if self._keys is None:
            if acting:
                raise PermissionDenied("set security.api_keys_file to change anything from the console")
            if not _is_address(request.url.host):
                raise PermissionDenied("without API keys the console answers to an address or localhost only")
            return
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        caller = self._keys.caller(key.strip() if kind.lower() == "bearer" else None)
        caller.require(Scope.ADMIN if acting else Scope.OBSERVE)

    # --- answers ------------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.Response:
        text, kind = self._pages[request.path]
        return web.Response(text=text, content_type=kind)

    async def _state(self, _request: web.Request) -> web.Response:
        now = self._dispatcher.now()
        rights = Rights(keys=self._keys is not None)
        registry, plans = self._dispatcher.registry, self._proposals()
        shown = state(registry, self._watch, plans, rights, now, stands_by=self._stands_by)
        return web.json_response(shown)

    async def _request(self, request: web.Request) -> web.Response:
        registry, name = self._dispatcher.registry, request.match_info["request"]
        found = registry.story(None if name == "last" else RequestId(name))
        if found is None:
            raise RequestNotFound(name, registry.num_remembered)
        story, decisions = found
        running = registry.current_attempt(story.request.id)
        told = explanation(story, decisions, running, now=self._dispatcher.now())
        shown = MessageToDict(
            told, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return web.Response(text=json.dumps(shown), content_type="application/json")

    async def _act(self, request: web.Request) -> web.Response:
        worker = WorkerId(request.match_info["worker"])
        state = self._dispatcher.registry.fleet.up(worker)
        if state is None:
            raise InvalidRequest(field="worker", value=worker, limit="a worker that is up")
        self._dispatcher.handle(_event(worker, request.match_info["action"], state.info.role))
        return web.json_response({})


def _event(worker: WorkerId, action: str, role: Role) -> Event:
    match action:
        case "drain":
            return DrainWorker(worker=worker, timeout_s=None)
        case "undrain":
            return UndrainWorker(worker=worker)
        case "flip":
            other = Role.PREFILL if role is Role.DECODE else Role.DECODE
            return ChangeWorkerRole(worker=worker, role=other)
        case _:
            raise InvalidRequest(field="action", value=action, limit="drain, undrain or flip")


def is_loopback(host: str) -> bool:
    """Nobody beyond this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True
