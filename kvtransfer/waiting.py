"""How the transfer thread sleeps: on descriptors, and in short steps while a push is under way."""

from __future__ import annotations

import logging
import os
import select
import time
from typing import Final

log = logging.getLogger(__name__)

SPIN_POLLS: Final = 50
BUSY_WAIT_S: Final = 0.001
STUCK_POLLS: Final = 1000
STUCK_WAIT_S: Final = 0.02
"""After that many polls without news: what is under way waits for a peer that may have been stopped."""
SPURIOUS_WAKES: Final = 20_000
SPURIOUS_S: Final = 10.0


def patience(quiet_polls: int) -> float:
    """How long to sleep between polls while a push is under way."""
    if quiet_polls < SPIN_POLLS:
        return 0.0
    return BUSY_WAIT_S if quiet_polls < STUCK_POLLS else STUCK_WAIT_S


class Waiter:
    """Sleeps until the service's eventfd or a descriptor of the backend is readable.

    A backend's descriptor that keeps waking the thread although nothing ever happens is dropped, with a
    warning, and the thread falls back to waking each millisecond.
    """

    def __init__(self, own_fd: int, backend_fds: tuple[int, ...]) -> None:
        self._own_fd = own_fd
        self._epoll = select.epoll()
        self._epoll.register(own_fd, select.EPOLLIN)
        self._backend_fds = backend_fds
        for fd in backend_fds:
            self._epoll.register(fd, select.EPOLLIN)
        self._wakes = 0
        self._quiet_since = 0.0
        self._fallback_s: float | None = None

    def saw_event(self, now: float) -> None:
        self._wakes, self._quiet_since = 0, now

    def wait(self, timeout_s: float | None, now: float) -> None:
        if timeout_s == 0.0:
            time.sleep(0)  # lets another thread have the GIL; a step of the spin, not a wait
            self._clear(self._epoll.poll(0))
            return
        if self._fallback_s is not None:
            timeout_s = self._fallback_s if timeout_s is None else min(timeout_s, self._fallback_s)
        ready = self._epoll.poll(timeout_s)
        self._clear(ready)
        if not ready:
            self.saw_event(now)
        elif any(fd != self._own_fd for fd, _ in ready):
            self._wakes += 1
            if self._wakes > SPURIOUS_WAKES and now - self._quiet_since > SPURIOUS_S:
                self._drop_backend_fds()

    def _clear(self, ready: list[tuple[int, int]]) -> None:
        if any(fd == self._own_fd for fd, _ in ready):
            os.eventfd_read(self._own_fd)

    def _drop_backend_fds(self) -> None:
        log.warning("the transport's descriptors wake the transfer thread for nothing; polling each 1 ms")
        for fd in self._backend_fds:
            self._epoll.unregister(fd)
        self._backend_fds = ()
        self._fallback_s = BUSY_WAIT_S

    def close(self) -> None:
        self._epoll.close()
