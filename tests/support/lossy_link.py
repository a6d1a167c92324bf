"""Packets that are lost on purpose: a classifier on what arrives at one end of a cable. Needs root."""

from __future__ import annotations

import re
import subprocess
from typing import Final

# Classic BPF: a random number below the bound drops the packet (TC_ACT_SHOT 2), else it passes (TC_ACT_OK 0).
_PROGRAM: Final = "4,32 0 0 4294963256,53 0 1 {bound},6 0 0 0,6 0 0 2"
_EVERYTHING: Final = 2**32 - 1


class LossyLink:
    """The end of the cable that is called `device` in a namespace."""

    def __init__(self, namespace: str, device: str) -> None:
        """Raises CalledProcessError where the kernel cannot do it."""
        self._namespace, self._device = namespace, device
        self._tc("qdisc", "add", "dev", device, "ingress")
        self._losing = False

    def lose(self, share: float) -> None:
        """Of the packets that arrive from now on, this share: 0 none, 1 all."""
        if self._losing:
            self._tc("filter", "del", "dev", self._device, "parent", "ffff:")
        self._losing = share > 0
        if self._losing:
            program = _PROGRAM.format(bound=min(int(share * 2**32), _EVERYTHING))
            where = ("filter", "add", "dev", self._device, "parent", "ffff:")
            self._tc(*where, "protocol", "all", "bpf", "da", "bytecode", program)

    @property
    def lost(self) -> int:
        """Packets, ever."""
        said = self._tc("-s", "qdisc", "show", "dev", self._device, "ingress")
        found = re.search(r"dropped (\d+)", said)
        assert found is not None, said
        return int(found[1])

    def _tc(self, *arguments: str) -> str:
        command = ["tc", "-n", self._namespace, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
