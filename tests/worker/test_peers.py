"""What a worker says of the way to its transfer peers."""

from __future__ import annotations

from kvtransfer.protocol import Path, PathInfo
from pdserve.core.ids import WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, Fingerprint
from pdserve.core.messages import ConnectPeer
from pdserve.core.worker_state import PairState
from pdserve.worker.peers import PeerTable

PEER = WorkerId("decode-0")
SHM = PathInfo(path=Path.SHM, gigabytes_per_s=8.0, latency_s=1e-5)


def table() -> PeerTable:
    peers = PeerTable()
    fingerprint = Fingerprint(protocol=PROTOCOL_VERSION, model="m", layouts=())
    peers.connect(ConnectPeer(peer=PEER, epoch=1, fingerprint=fingerprint, metadata=b""))
    peers.connected(PEER, SHM)
    return peers


def test_a_peer_that_was_met_has_a_path_and_what_was_measured() -> None:
    assert table().states() == [PairState(peer=PEER, path="shm", bytes_per_s=8e9, latency_s=1e-5)]


def test_a_peer_that_failed_is_told_with_the_reason_until_it_is_met_again() -> None:
    peers = table()
    peers.failed(PEER, "refused by transfer.tcp_fallback")
    assert peers.epoch(PEER) is None
    assert [state.error for state in peers.states()] == ["refused by transfer.tcp_fallback"]
    peers.connected(PEER, SHM)
    assert [state.error for state in peers.states()] == [""]


def test_a_peer_that_could_never_be_met_is_told_as_well() -> None:
    peers = PeerTable()
    peers.failed(PEER, "other weights")
    assert peers.states() == [
        PairState(peer=PEER, path="unknown", bytes_per_s=None, latency_s=None, error="other weights")
    ]


def test_a_peer_whose_process_is_gone_is_not_told_of() -> None:
    peers = table()
    peers.drop(PEER, 1)
    assert peers.states() == []
