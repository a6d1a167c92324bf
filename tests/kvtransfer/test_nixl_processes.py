"""NIXL between processes: bytes, and what happens when one of them is killed or stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path as File

import numpy as np
import pytest

from kvtransfer.protocol import Outcome, Path, PeerConnected
from tests.support.paths import REPO
from tests.support.transfer import POISON, WAIT_S
from tests.support.transfer_process import BIG, NUM_BLOCKS, NodeProcess

TRANSPORTS = {"shm": {}, "tcp": {"TLS": "tcp", "NET_DEVICES": "lo"}}
ALL = list(range(NUM_BLOCKS))
FEW = ALL[:8]
"""One fragment."""
Start = Callable[..., NodeProcess]


@pytest.fixture(params=["shm", "tcp"])
def start(request: pytest.FixtureRequest, tmp_path: File) -> Iterator[Start]:
    """Starts node processes that talk over one transport; they start side by side until `await_ready`."""
    nodes: list[NodeProcess] = []

    def make(name: str, *, seed: int | None = None, epoch: int = 1) -> NodeProcess:
        node = NodeProcess(
            name, tmp_path / f"{name}@{epoch}", epoch=epoch, seed=seed, ucx=TRANSPORTS[request.param]
        )
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.clean_up()


@pytest.fixture
def pair(start: Start) -> tuple[NodeProcess, NodeProcess]:
    sender, receiver = start("p", seed=5), start("d")
    sender.await_ready()
    receiver.await_ready()
    sender.meet(receiver)
    return sender, receiver


Pair = tuple[NodeProcess, NodeProcess]


def test_bytes_arrive_in_another_process_and_nowhere_else(pair: Pair, request: pytest.FixtureRequest) -> None:
    sender, receiver = pair
    src, dst = [5, 6, 7, 1, 31], [28, 29, 30, 0, 17]
    end = sender.events.terminal(sender.push("d", src, dst))
    assert end.outcome is Outcome.COMPLETED, end.error
    assert end.bytes_moved == 5 * BIG.block_bytes
    assert receiver.events.await_notes(1) == [b"note"]
    wanted = np.full_like(receiver.pools().shaped(0), POISON)
    wanted[dst] = sender.pools().shaped(0)[src]
    np.testing.assert_array_equal(receiver.pools().shaped(0), wanted)
    (met,) = [e for e in sender.events.seen if isinstance(e, PeerConnected)]
    assert met.path.path is (Path.TCP if "tcp" in request.node.name else Path.SHM)
    assert sender.stop() == 0
    assert receiver.stop() == 0


def test_a_receiver_killed_before_a_push_fails_it_soon_and_leaves_other_peers_alone(
    pair: Pair, start: Start
) -> None:
    sender, receiver = pair
    other = start("d2")
    other.await_ready()
    sender.meet(other)
    receiver.kill()
    began = time.monotonic()
    end = sender.events.terminal(sender.push("d", ALL, ALL))
    assert time.monotonic() - began < 5
    assert end.outcome is Outcome.FAILED
    assert end.error
    sender.events.until(lambda: sender.events.failed_peers == ["d"], "news of the dead peer")
    assert sender.events.terminal(sender.push("d", [0], [0])).outcome is Outcome.FAILED
    assert sender.events.terminal(sender.push("d2", ALL, ALL)).outcome is Outcome.COMPLETED
    other.events.await_notes(1)
    np.testing.assert_array_equal(other.pools().arrays[0], sender.pools().arrays[0])
    assert sender.stop() == 0
    assert other.stop() == 0


def test_a_receiver_killed_during_pushes_fails_the_rest_and_its_next_process_is_met(
    pair: Pair, start: Start
) -> None:
    sender, receiver = pair
    ids = [sender.push("d", ALL, ALL) for _ in range(600)]
    sender.events.terminal(ids[20])
    receiver.kill()
    outcomes = [sender.events.terminal(i).outcome for i in ids]
    assert outcomes.count(Outcome.COMPLETED) >= 21
    assert outcomes.count(Outcome.FAILED) >= 1, "all pushes were done before the kill: nothing was tested"
    assert set(outcomes) == {Outcome.COMPLETED, Outcome.FAILED}
    reborn = start("d", epoch=2)
    reborn.await_ready()
    sender.meet(reborn)
    assert sender.events.terminal(sender.push("d", [1], [2])).outcome is Outcome.COMPLETED
    reborn.events.await_notes(1)
    np.testing.assert_array_equal(reborn.pools().shaped(0)[2], sender.pools().shaped(0)[1])
    assert sender.stop() == 0
    assert reborn.stop() == 0


def test_a_sender_killed_during_pushes_leaves_the_receiver_working(pair: Pair, start: Start) -> None:
    sender, receiver = pair
    for i in range(300):
        sender.push("d", ALL, ALL, note=b"%d" % i)
    receiver.events.await_notes(5)
    sender.kill()
    other = start("p2", seed=8)
    other.await_ready()
    other.meet(receiver)
    assert other.events.terminal(other.push("d", ALL, ALL, note=b"p2")).outcome is Outcome.COMPLETED
    receiver.events.until(lambda: b"p2" in receiver.events.notes, "the other sender's note")
    assert receiver.events.notes.count(b"299") == 0, (
        "all pushes were done before the kill: nothing was tested"
    )
    assert other.stop() == 0
    assert receiver.stop() == 0


def push_that_hangs(sender: NodeProcess, receiver: NodeProcess) -> int:
    """Stop the receiver, and push what cannot complete meanwhile: the note fills every socket buffer.

    (By shared memory the bytes land in a stopped process, and a small note waits in the kernel: COMPLETED.)
    """
    receiver.freeze()
    push_id = sender.push("d", FEW, FEW, deadline_s=0.3, padding=32 << 20)
    sender.events.until(lambda: bool(sender.events.of_push(push_id)), "deadline")
    assert [e.outcome for e in sender.events.of_push(push_id)] == [Outcome.TIMED_OUT]
    assert receiver.state() == "T"
    return push_id


def test_a_push_to_a_stopped_receiver_times_out_and_ends_once_it_goes_on(pair: Pair) -> None:
    sender, receiver = pair
    push_id = push_that_hangs(sender, receiver)
    receiver.thaw()
    assert sender.events.terminal(push_id).outcome is Outcome.COMPLETED
    receiver.events.await_notes(1)
    np.testing.assert_array_equal(receiver.pools().shaped(0)[FEW], sender.pools().shaped(0)[FEW])
    assert sender.stop() == 0
    assert receiver.stop() == 0


def test_a_stopped_receiver_that_is_then_killed_fails_what_was_under_way(pair: Pair) -> None:
    sender, receiver = pair
    push_id = push_that_hangs(sender, receiver)
    receiver.kill()
    assert sender.events.terminal(push_id).outcome is Outcome.FAILED
    assert sender.stop() == 0


def test_disconnecting_a_stopped_receiver_ends_its_pushes_and_the_sender_goes_on(
    pair: Pair, start: Start
) -> None:
    sender, receiver = pair
    push_id = push_that_hangs(sender, receiver)
    sender.disconnect(receiver)
    assert sender.events.terminal(push_id).outcome is Outcome.FAILED
    other = start("d2")
    other.await_ready()
    sender.meet(other)
    assert sender.events.terminal(sender.push("d2", [0], [0])).outcome is Outcome.COMPLETED
    assert sender.stop() == 0


def test_a_sender_stops_well_while_a_push_to_a_stopped_receiver_is_under_way(pair: Pair) -> None:
    sender, receiver = pair
    push_id = push_that_hangs(sender, receiver)
    assert sender.stop() == 0
    assert sender.events.terminal(push_id).outcome is Outcome.FAILED
    assert sender.events.await_stopped().error == ""


def test_a_sender_that_ends_right_after_a_failed_push_does_not_abort(tmp_path: File) -> None:
    receiver = NodeProcess("d", tmp_path / "d", seed=None, ucx={})
    try:
        receiver.await_ready()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.support.transfer_abrupt",
                receiver.metadata.hex(),
                str(receiver.pid),
            ],
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "FAILED" in done.stdout
        assert receiver.process.wait(WAIT_S) == -signal.SIGKILL
    finally:
        receiver.clean_up()
