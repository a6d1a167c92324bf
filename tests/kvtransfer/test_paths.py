"""Which way the bytes go, and what is done when it is not the way it ought to be."""

from __future__ import annotations

import logging
import os

import pytest

from kvtransfer.path import slow_path
from kvtransfer.protocol import Outcome, Path
from pdserve.core.errors import TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.transfer_settings import TcpFallback, TransferSettings
from pdserve.worker.backends import configured_backend
from tests.support.transfer import LAYOUTS, NodeMaker, Pools, fingerprint

TCP_AMONG_OTHERS = {"TLS": "tcp,self", "NET_DEVICES": "lo"}
"""Leaves only TCP between two workers, without saying that TCP is what is wanted."""


@pytest.mark.parametrize("path", [path for path in Path if path is not Path.TCP])
def test_only_tcp_can_be_a_slow_path(path: Path) -> None:
    assert slow_path(path, same_host=True, both_rdma=True, ucx={}) == ""


def test_tcp_is_slow_within_a_host_and_between_hosts_with_rdma_unless_asked_for() -> None:
    assert "this host" in slow_path(Path.TCP, same_host=True, both_rdma=False, ucx={})
    assert "RDMA" in slow_path(Path.TCP, same_host=False, both_rdma=True, ucx={})
    assert slow_path(Path.TCP, same_host=False, both_rdma=False, ucx={}) == ""
    assert slow_path(Path.TCP, same_host=True, both_rdma=True, ucx={"TLS": "tcp"}) == ""


def test_a_fallback_to_tcp_is_used_with_a_warning(
    make_node: NodeMaker, caplog: pytest.LogCaptureFixture
) -> None:
    sender = make_node("p", backend="nixl", seed=1, ucx=TCP_AMONG_OTHERS)
    receiver = make_node("d", backend="nixl", ucx=TCP_AMONG_OTHERS)
    with caplog.at_level(logging.WARNING, "kvtransfer"):
        sender.meet(receiver)
    assert sender.backend.path(receiver.name).path is Path.TCP
    assert "transfer.tcp_fallback" in caplog.text
    assert sender.events.terminal(sender.push("d", [0], [0])).outcome is Outcome.COMPLETED


def test_a_refused_fallback_to_tcp_moves_nothing(make_node: NodeMaker) -> None:
    options = {"backend": "nixl", "ucx": TCP_AMONG_OTHERS, "tcp_fallback": TcpFallback.REFUSE}
    sender, receiver = make_node("p", seed=1, **options), make_node("d", **options)
    sender.service.connect(receiver.name, receiver.epoch, receiver.fingerprint, receiver.backend.metadata)
    sender.events.until(lambda: sender.events.failed_peers == ["d"], "refusal")
    end = sender.events.terminal(sender.push("d", [0], [0]))
    assert end.outcome is Outcome.FAILED
    assert "transfer.tcp_fallback" in end.error
    assert receiver.events.notes == []


def test_a_list_of_transports_leaves_the_environment_as_it_was(make_node: NodeMaker) -> None:
    before = dict(os.environ)
    make_node("p", backend="nixl", seed=1, ucx=TCP_AMONG_OTHERS)
    assert dict(os.environ) == before


def test_the_configuration_reaches_the_transport() -> None:
    """UCX refuses to start with a network device that is not there: proof that it was told."""
    pools = Pools(LAYOUTS, 2, seed=1)
    make = configured_backend(TransferSettings(ucx={"TLS": "tcp"}))
    make(WorkerId("p"), 1, pools.regions, fingerprint()).close()
    make = configured_backend(TransferSettings(ucx={"TLS": "no_such_transport"}))
    with pytest.raises(TransferError, match="UCX"):
        make(WorkerId("p"), 1, pools.regions, fingerprint())


@pytest.mark.parametrize("name", ["UCX_TLS", "tls", "", "A=B", "A,B"])
def test_names_that_ucx_would_pass_over_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="without UCX_"):
        TransferSettings(ucx={name: "x"})
