"""Finding, starting and ending the keepers of local Rays: the side of `pdserve serve` (see `keeper`)."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdserve.cluster.keeper import ANSWER, SOCKET, Answer, Ask, Declined, Failed, KeeperSpec, KeptRay, Request
from pdserve.cluster.run_dir import ROOT, existing
from pdserve.core.errors import ConfigError

log = logging.getLogger(__name__)

_ANSWER_S: Final = 2.0
"""A keeper answers at once, unless it is stopped."""
_END_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class KeeperLink:
    """Held for the life of the deployment. When this process dies, the keeper sees it close."""

    ray: KeptRay
    sock: socket.socket

    def linger(self) -> None:
        """From now on the workers outlive this process, if it is killed."""
        _send(self.sock, Request(ask=Ask.LINGER))

    def end(self) -> None:
        """End Ray and the keeper, and wait for that. Raises TimeoutError when it takes too long."""
        self.sock.settimeout(_END_S)
        try:
            _send(self.sock, Request(ask=Ask.END))
            while self.sock.recv(4096):
                pass
        except ConnectionError:
            pass
        finally:
            self.sock.close()


def claim(identity: str, port: int, root: Path = ROOT) -> KeeperLink | None:
    """Take over the deployment that a killed `pdserve serve` left, if there is one.

    One with other settings that was abandoned on the same port is ended: its memory is wanted, its port ours.
    """
    for run_dir in existing(root):
        try:
            sock = _connect(run_dir)
        except OSError:
            continue
        try:
            answer = _ask(sock, Request(ask=Ask.CLAIM, identity=identity, port=port))
        except (OSError, ValueError) as error:
            log.warning("the keeper in %s does not answer: %s", run_dir, error)
            sock.close()
            continue
        match answer:
            case KeptRay():
                return KeeperLink(answer, sock)
            case Declined(same_port=True):
                log.warning("ending the abandoned deployment in %s: its settings were others", run_dir)
                sock.settimeout(_END_S)
                _send(sock, Request(ask=Ask.END))
                while sock.recv(4096):
                    pass
        sock.close()
    return None


def start(spec: KeeperSpec) -> KeeperLink:
    """Start a keeper with a Ray of its own, and hold it. Raises `ConfigError` when Ray does not start."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pdserve.cluster.keeper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is for us alone
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(spec.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    if not line:
        raise ConfigError(f"cluster.address: Ray did not start here: its keeper ended ({process.wait()})")
    answer = ANSWER.validate_json(line)
    if isinstance(answer, Failed):
        process.wait()
        raise ConfigError(answer.why)
    if isinstance(answer, Declined):
        raise ConfigError("cluster.address: the keeper of Ray declined its own starter")
    sock = _connect(answer.run_dir)
    claimed = _ask(sock, Request(ask=Ask.CLAIM, identity=spec.identity, port=spec.port))
    if not isinstance(claimed, KeptRay):
        raise ConfigError(f"cluster.address: the keeper in {answer.run_dir} gave its Ray to another process")
    return KeeperLink(claimed, sock)


def _connect(run_dir: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(_ANSWER_S)
    try:
        sock.connect(str(run_dir / SOCKET))
    except OSError:
        sock.close()
        raise
    return sock


def _send(sock: socket.socket, request: Request) -> None:
    sock.sendall(request.model_dump_json().encode() + b"\n")


def _ask(sock: socket.socket, request: Request) -> Answer:
    _send(sock, request)
    received = b""
    while not received.endswith(b"\n"):
        if not (part := sock.recv(65536)):
            raise ConnectionError("it closed the connection")
        received += part
    return ANSWER.validate_json(received)
