"""Two network namespaces of this machine, joined by a virtual cable: nearly two hosts. Needs root.

Traffic between them cannot take the loopback device, nor shared memory where UCX is told to use TCP.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_CLONE_NEWNS: Final = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
DEVICE: Final = "veth0"
ADDRESSES: Final = ("10.213.7.1", "10.213.7.2")


def available() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Their names; both, and the cable, are gone afterwards. Raises CalledProcessError."""
    names = f"pdserve-{os.getpid()}-a", f"pdserve-{os.getpid()}-b"
    with ExitStack() as undo:
        for name in names:
            _ip("netns", "add", name)
            undo.callback(_ip, "netns", "delete", name)
        _ip("link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", DEVICE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            for device in (DEVICE, "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield names


def within(name: str) -> list[str]:
    """What to put before a command so that it runs in a namespace."""
    return ["ip", "netns", "exec", name]


def enter(name: str | None) -> None:
    """Put this thread, and what it starts, into a namespace for good; None changes nothing."""
    if name is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as there:
        # UCX lists devices in /sys, which shows those of the namespace that mounted it.
        _check(libc.unshare(_CLONE_NEWNS))
        _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
        _check(libc.setns(there.fileno(), _CLONE_NEWNET))
        _check(libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
