"""The transfer peers of a worker: which process of each is the current one."""

from __future__ import annotations

from kvtransfer.protocol import Path, PathInfo
from pdserve.core.ids import WorkerId
from pdserve.core.messages import ConnectPeer
from pdserve.core.worker_state import PairState
from pdserve.worker.events import Action, ConnectTransfer, DisconnectTransfer


class PeerTable:
    """Known peers and their epochs. A peer that failed is unknown until a coordinator connects it again."""

    def __init__(self) -> None:
        self._epochs: dict[WorkerId, int] = {}
        self._paths: dict[WorkerId, PathInfo] = {}
        self._errors: dict[WorkerId, str] = {}

    def epoch(self, peer: WorkerId) -> int | None:
        return self._epochs.get(peer)

    def path(self, peer: WorkerId) -> Path:
        """The transport to a peer, as far as it is known."""
        info = self._paths.get(peer)
        return Path.UNKNOWN if info is None else info.path

    def connect(self, message: ConnectPeer) -> list[Action]:
        """Several coordinators may introduce the same peer: only news is acted upon."""
        known = self._epochs.get(message.peer)
        if known is not None and known >= message.epoch:
            return []
        self._epochs[message.peer] = message.epoch
        return [ConnectTransfer(message)]

    def connected(self, peer: WorkerId, path: PathInfo) -> None:
        self._paths[peer] = path
        self._errors.pop(peer, None)

    def failed(self, peer: WorkerId, error: str) -> None:
        """Nothing moves there until a coordinator connects it again."""
        self._epochs.pop(peer, None)
        self._errors[peer] = error

    def states(self) -> list[PairState]:
        """What is known of the way to each peer."""
        unknown = PathInfo(path=Path.UNKNOWN)
        return [
            _state(peer, self._paths.get(peer, unknown), self._errors.get(peer, "")) for peer in self._met()
        ]

    def _met(self) -> list[WorkerId]:
        return sorted({*self._paths, *self._errors})

    def drop(self, peer: WorkerId, epoch: int) -> list[Action]:
        """The process of that epoch is gone; a newer one, already connected, stays."""
        known = self._epochs.get(peer)
        if known is not None and known <= epoch:
            self.forget(peer)
        return [DisconnectTransfer(peer, epoch)]

    def forget(self, peer: WorkerId) -> None:
        """Its process is gone."""
        self._epochs.pop(peer, None)
        self._paths.pop(peer, None)
        self._errors.pop(peer, None)


def _state(peer: WorkerId, path: PathInfo, error: str) -> PairState:
    rate = path.gigabytes_per_s
    return PairState(
        peer=peer,
        path=path.path.value,
        bytes_per_s=None if rate is None else rate * 1e9,
        latency_s=path.latency_s,
        error=error,
    )
