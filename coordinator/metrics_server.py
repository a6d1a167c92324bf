"""The pages that Prometheus asks for, on threads of their own, so that a slow scrape holds up no token.

`/ray-targets` passes on where Ray's nodes export their metrics, as Prometheus's HTTP discovery wants it: Ray
writes that into a file, in a folder that a scrape's configuration cannot know beforehand.
"""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

_STOP_POLL_S: Final = 0.05
"""How often the accepting thread looks whether it shall end; `http.server` offers no event."""
RAY_TARGETS_PATH: Final = "/ray-targets"


class _Threading(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # the base class's name for it
        """Scrapes are not news."""


class MetricsServer:
    """Listens from construction on. Raises OSError when the port is taken; port 0 takes a free one."""

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, ray_targets: Path | None = None
    ) -> None:
        """ray_targets: Ray's service discovery file. None: without Ray."""
        self._metrics, self._ray_targets = make_wsgi_app(registry), ray_targets
        self._server = make_server(host, port, self._page, server_class=_Threading, handler_class=_Silent)
        self.port: Final = int(self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_STOP_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Blocks for at most a moment."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _page(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != RAY_TARGETS_PATH:
            page: Iterable[bytes] = self._metrics(environ, start_response)
            return page
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(_targets(self._ray_targets)).encode()]


def _targets(path: Path | None) -> object:
    """What Ray wrote; nothing while it has not, or is about to."""
    try:
        return [] if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return []
