"""The whole suite, from nothing: sets up the peers that are missing, then measures everything.

    python -m benchmarks                    what `make bench` runs
    python -m benchmarks --quick            every system once and briefly: does it all still run?

Takes the arguments of `python -m benchmarks.serving`. A peer that cannot be set up is left out, by name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import serving
from benchmarks.environment import REPO
from benchmarks.peers import PEERS, set_up_all


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    wanted = serving.parse_arguments(given).systems
    needed = sorted({peer for name in wanted if (peer := _peer_of(name)) is not None})
    failures = set_up_all(REPO, needed)
    for peer, why in failures.items():
        print(f"{peer} is left out: {why}", file=sys.stderr)
    systems = [name for name in wanted if _peer_of(name) not in failures]
    status = serving.main([*given, "--systems", ",".join(systems)])
    return status or (1 if failures else 0)


def _peer_of(system: str) -> str | None:
    """The virtual environment a system runs in; None for pdserve, which runs in ours."""
    return next((peer for peer in PEERS if system.startswith(peer)), None)


if __name__ == "__main__":
    sys.exit(main())
