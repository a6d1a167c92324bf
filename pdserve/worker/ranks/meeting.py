"""How the ranks of a worker find one another, and what they compute together with."""

from __future__ import annotations

import datetime
import socket
from typing import TYPE_CHECKING, Final

from pdserve.core.errors import WorkerLost
from pdserve.core.ids import WorkerId
from pdserve.engine.ranks import GlooRanks, NcclRanks, meeting_place
from pdserve.worker.ranks.names import RankSpec, make_meeting
from pdserve.worker.ranks.wire import Joining, Link

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from pdserve.models.ranks import Ranks

COLLECTIVE_TIMEOUT_S: Final = 60.0
"""Ranks compute alike: one that lags by this much hangs. Who watches the processes notices sooner."""
_LISTENS: Final = "leader listens"


def await_followers(worker: WorkerId, spec: RankSpec, timeout_s: float) -> tuple[dict[int, Link], Store]:
    """On rank 0: a link to every other rank, by rank. Raises `WorkerLost` when not all come in time."""
    make_meeting(spec)
    links: dict[int, Link] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(spec.socket))
        server.listen(spec.size)
        server.settimeout(timeout_s)
        store = meeting_place(spec.store, spec.size)
        store.set(_LISTENS, "")
        while len(links) < spec.size - 1:
            try:
                connected, _ = server.accept()
                connected.settimeout(timeout_s)
                link = Link(connected)
                joining = link.receive()
            except OSError as error:
                missing = sorted(set(range(1, spec.size)) - set(links))
                _close(links)
                raise WorkerLost(worker, f"ranks {missing} did not come: {error}") from error
            if not isinstance(joining, Joining) or joining.rank in links:
                _close(links)
                link.close()
                raise WorkerLost(worker, f"wanted a rank to join, found {joining}")
            links[joining.rank] = link
    return links, store


def join_leader(worker: WorkerId, spec: RankSpec, pid: int, timeout_s: float) -> tuple[Link, Store]:
    """On the other ranks. Raises `WorkerLost` when rank 0 is not there in time."""
    make_meeting(spec)
    store = meeting_place(spec.store, spec.size)
    connected = socket.socket(socket.AF_UNIX)
    try:
        _await_key(store, timeout_s)
        connected.connect(str(spec.socket))
        link = Link(connected)
        link.send(Joining(spec.rank, pid))
    except (OSError, RuntimeError) as error:  # RuntimeError: the store's, for a wait that was too long
        connected.close()
        raise WorkerLost(worker, f"rank {spec.rank} does not find rank 0: {error}") from error
    return link, store


def make_ranks(worker: WorkerId, spec: RankSpec, store: Store, device: str) -> Ranks:
    """Called on all ranks at the same time. Raises `WorkerLost`, `ConfigError`."""
    kind = GlooRanks if device == "cpu" else NcclRanks
    return kind(str(worker), store, spec.rank, spec.size, COLLECTIVE_TIMEOUT_S)


def _close(links: dict[int, Link]) -> None:
    for link in links.values():
        link.close()


def _await_key(store: Store, timeout_s: float) -> None:
    store.wait([_LISTENS], datetime.timedelta(seconds=timeout_s))
