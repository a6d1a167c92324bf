"""The page that Prometheus scrapes, on threads of its own, so that a slow scrape holds up no token."""

from __future__ import annotations

import socketserver
import threading
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

_STOP_POLL_S: Final = 0.05
"""How often the accepting thread looks whether it shall end; `http.server` offers no event."""


class _Threading(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # the base class's name for it
        """Scrapes are not news."""


class MetricsServer:
    """Listens from construction on. Raises OSError when the port is taken; port 0 takes a free one."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        app = make_wsgi_app(registry)
        self._server = make_server(host, port, app, server_class=_Threading, handler_class=_Silent)
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
