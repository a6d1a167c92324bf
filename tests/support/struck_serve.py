"""`pdserve serve`, which sends itself a signal in the very event that brings a request into a phase.

Arguments: a file, then those of `pdserve`. While the file is there, it holds a phase and a signal's number;
it is removed when the signal is sent.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from coordinator.events import Action, Event
from coordinator.registry import Registry
from pdserve.cli.app import main
from pdserve.core.lifecycle import Phase
from tests.support.strikes import has_entered


def strike_when_told(order: Path) -> None:
    handle = Registry.handle

    def handle_and_strike(registry: Registry, event: Event, now: float) -> list[Action]:
        actions = handle(registry, event, now)
        if order.exists():
            phase, number = order.read_text().split()
            if has_entered(registry, Phase(phase)):
                order.unlink()
                os.kill(os.getpid(), int(number))
        return actions

    Registry.handle = handle_and_strike  # type: ignore[method-assign]  # where events come by


if __name__ == "__main__":
    strike_when_told(Path(sys.argv[1]))
    sys.argv[1:] = sys.argv[2:]
    main()
