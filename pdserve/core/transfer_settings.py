"""How KV moves: as the configuration has it."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from pdserve.core.settings import Frozen, PositiveInt, Seconds, on_or_off


class TransferBackendName(StrEnum):
    NIXL = "nixl"
    LOCAL = "local"
    FAKE = "fake"


class TcpFallback(StrEnum):
    """What to do when KV goes by TCP where a faster way was to be expected."""

    ALLOW = "allow"
    WARN = "warn"
    REFUSE = "refuse"


class Verify(StrEnum):
    """Whether the bytes of each push are compared with what was sent."""

    ON = "on"
    OFF = "off"
    AUTO = "auto"


def _ucx_names(options: dict[str, str]) -> dict[str, str]:
    """UCX passes over names it does not know, so the likely slips are caught here."""
    for name in options:
        if name.startswith("UCX_") or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError(f"{name!r}: UCX options are given in capitals and without UCX_, such as TLS")
    return options


class TransferSettings(Frozen):
    backend: TransferBackendName = TransferBackendName.NIXL
    """nixl moves between processes and machines; local and fake join workers of one process, for tests."""
    layer_groups: PositiveInt = 4
    """Layers are pushed in about this many groups per chunk, each while the next computes."""
    deadline_s: Seconds = 30.0
    """A push that is not terminal by then fails its attempt."""
    lease_s: Seconds = 30.0
    """Blocks reserved for a request are given back this long after the last sign of its prefill."""
    verify: Annotated[Verify, BeforeValidator(on_or_off)] = Verify.AUTO
    """Compare a digest of what arrived with one of what was sent. auto: where that takes at most 2% of the
    transfer's time: on links up to about 5 Gbit/s between CPUs, and between GPUs where a kernel can."""
    max_inflight_mib: PositiveInt = 32
    """Under way between two workers at most; more waits, and requests take turns."""
    tcp_fallback: TcpFallback = TcpFallback.WARN
    """For two workers of one host, or of two hosts with RDMA, whose KV would go by TCP all the same: say
    nothing, say so loudly, or move no KV between these two."""
    ucx: Annotated[dict[str, str], AfterValidator(_ucx_names)] = Field(default_factory=dict)
    """UCX options without their prefix, such as `{TLS: tcp, NET_DEVICES: eth0}`; a UCX_* variable in a
    worker's environment wins."""
