"""Log files of a Ray cluster's nodes, through Ray's state API: what other machines wrote."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import ray
import ray._private.utils
from ray.util.state import get_log, list_logs, list_nodes
from ray.util.state.exception import RayStateApiException

from pdserve.core.errors import ConfigError

_ANSWER_S: Final = 20
"""What Ray's API may take for one list or the beginning of one file."""
_CONNECT_S: Final = 1.0
_FAILURES: Final = (RayStateApiException, ray.exceptions.RayError, OSError, ValueError)
"""What Ray's client raises; the errors of its HTTP library are OSErrors."""


@dataclass(frozen=True, slots=True)
class NodeFile:
    """A log file where it lies."""

    node_id: str
    node_ip: str
    name: str


def cluster_here() -> str | None:
    """Where the head is of the Ray cluster that this machine was joined to by `ray start`, if it answers."""
    address = ray._private.utils.read_ray_address()
    return str(address) if address and _answers(address) else None


def node_files(address: str, patterns: Iterable[str]) -> Iterator[NodeFile | str]:
    """Files of all living nodes whose names fit a pattern; or a line that says which node does not answer.

    address: of the cluster's head. Raises `ConfigError` when nobody answers there.
    """
    if not _answers(address):  # Ray itself would try for a minute
        raise ConfigError(f"no Ray cluster answers at {address}")
    try:
        nodes = list_nodes(address, filters=[("state", "=", "ALIVE")], timeout=_ANSWER_S)
    except _FAILURES as error:
        raise ConfigError(f"Ray's dashboard, which knows the logs, at {address}: {error}") from error
    for node in nodes:
        for pattern in patterns:
            try:
                groups = list_logs(address, node_id=node.node_id, glob_filter=pattern, timeout=_ANSWER_S)
            except _FAILURES as error:
                yield f"{node.node_ip}: {error}"
                break
            yield from (
                NodeFile(node.node_id, node.node_ip, name) for names in groups.values() for name in names
            )


def lines_in(address: str, file: NodeFile) -> Iterator[str]:
    """Its lines, fetched as they are read. Raises `ConfigError` when the node does not send it."""
    rest = b""
    try:
        chunks: Iterator[bytes] = get_log(  # type: ignore[assignment]  # bytes, for encoding=None
            address, node_id=file.node_id, filename=file.name, tail=-1, timeout=_ANSWER_S, encoding=None
        )
        for chunk in chunks:
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    except _FAILURES as error:
        raise ConfigError(f"{file.node_ip}: {file.name} cannot be read: {error}") from error
    if rest:
        yield rest.decode(errors="replace")


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True
