"""Transfer services in one process, over every backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvtransfer.factory import make_backend
from kvtransfer.fake import Faults
from kvtransfer.local import LocalHub
from kvtransfer.queues import FRAGMENT_BYTES
from kvtransfer.service import TransferService
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.transfer_settings import TcpFallback, TransferBackendName, Verify
from tests.support.transfer import Events, Node, NodeMaker, Pools, fingerprint


@pytest.fixture
def make_node() -> Iterator[NodeMaker]:
    """Makes nodes of one process, and stops those that still run."""
    hub = LocalHub()
    with contextlib.ExitStack() as stack:

        def make(
            name: str,
            *,
            backend: str,
            epoch: int = 1,
            seed: int | None = None,
            num_blocks: int = 24,
            model: str = "m",
            faults: Faults | None = None,
            ucx: dict[str, str] | None = None,
            tcp_fallback: TcpFallback = TcpFallback.WARN,
            max_inflight_bytes: int = 1 << 30,
            verify: Verify = Verify.ON,
            fragment_bytes: int = FRAGMENT_BYTES,
            prints: Fingerprint | None = None,
        ) -> Node:
            prints = prints or fingerprint(model)
            pools = Pools(prints.layouts, num_blocks, seed=seed)
            made = make_backend(
                TransferBackendName(backend),
                WorkerId(name),
                epoch,
                pools.regions,
                prints,
                hub=hub,
                faults=faults,
                ucx=ucx,
                tcp_fallback=tcp_fallback,
            )
            events = Events()
            service = TransferService(
                made,
                events,
                max_inflight_bytes=max_inflight_bytes,
                verify=verify,
                fragment_bytes=fragment_bytes,
            )
            service.start()
            node = Node(WorkerId(name), epoch, pools, made, service, events, prints)
            stack.callback(node.stop)
            return node

        yield make


@pytest.fixture(params=["local", "fake", "nixl", "nixl-tcp"])
def transport(request: pytest.FixtureRequest) -> dict[str, object]:
    """Arguments for `make_node` that choose a backend."""
    if request.param == "nixl-tcp":
        return {"backend": "nixl", "ucx": {"TLS": "tcp", "NET_DEVICES": "lo"}}
    return {"backend": request.param}


@pytest.fixture
def pair(make_node: NodeMaker, transport: dict[str, object]) -> tuple[Node, Node]:
    """A sender with random bytes and a receiver full of poison, connected."""
    sender = make_node("prefill-0", seed=7, **transport)
    receiver = make_node("decode-0", **transport)
    sender.meet(receiver)
    return sender, receiver
