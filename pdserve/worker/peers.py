"""The transfer peers of a worker: which process of each is the current one."""

from __future__ import annotations

from kvtransfer.protocol import Path, PathInfo
from pdserve.core.ids import WorkerId
from pdserve.core.messages import ConnectPeer
from pdserve.worker.events import Action, ConnectTransfer, DisconnectTransfer


class PeerTable:
    """Known peers and their epochs. A peer that failed is unknown until a coordinator connects it again."""

    def __init__(self) -> None:
        self._epochs: dict[WorkerId, int] = {}
        self._paths: dict[WorkerId, PathInfo] = {}

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

    def drop(self, peer: WorkerId, epoch: int) -> list[Action]:
        """The process of that epoch is gone; a newer one, already connected, stays."""
        known = self._epochs.get(peer)
        if known is not None and known <= epoch:
            self.forget(peer)
        return [DisconnectTransfer(peer, epoch)]

    def forget(self, peer: WorkerId) -> None:
        self._epochs.pop(peer, None)
        self._paths.pop(peer, None)
