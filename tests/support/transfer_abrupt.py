"""A sender that ends as soon as a push to a killed receiver has failed: no progress is made in between.

Arguments: the receiver's metadata in hex, its process id. Prints the outcome; a crash shows as exit status.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from kvtransfer.nixl import NixlBackend
from kvtransfer.protocol import PeerConnected, Push, PushEnded, TransferEvent
from pdserve.core.ids import BlockId, WorkerId
from tests.support.transfer import WAIT_S, Pools, fingerprint
from tests.support.transfer_process import BIG, NUM_BLOCKS


def main() -> None:
    metadata, pid = bytes.fromhex(sys.argv[1]), int(sys.argv[2])
    ours = fingerprint(layouts=(BIG,))
    pools = Pools((BIG,), NUM_BLOCKS, seed=1)
    backend = NixlBackend(WorkerId("p"), 1, pools.regions, ours, ucx={})
    backend.connect(WorkerId("d"), 1, ours, metadata)
    until(backend, PeerConnected)
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    blocks = tuple(BlockId(b) for b in range(NUM_BLOCKS))
    backend.submit(
        Push(
            id=1,
            peer=WorkerId("d"),
            group=0,
            src_blocks=blocks,
            dst_blocks=blocks,
            layers=(0, BIG.group.num_layers),
            note=b"",
            deadline=0.0,
        )
    )
    end = until(backend, PushEnded)
    backend.close()
    print(end)


def until(backend: NixlBackend, kind: type[TransferEvent]) -> TransferEvent:
    began = time.monotonic()
    while time.monotonic() < began + WAIT_S:
        for event in backend.poll(time.monotonic()):
            if isinstance(event, kind):
                return event
    sys.exit(f"no {kind.__name__} within {WAIT_S} s")


if __name__ == "__main__":
    main()
