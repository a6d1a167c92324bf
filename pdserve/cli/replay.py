"""`pdserve replay`: whether a recorded coordinator would decide the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdserve.cli.console import ERR
from pdserve.core.config import ServeConfig


def replay(
    recording: Annotated[Path, typer.Argument(help="What coordinator.record had written.", metavar="FILE")],
) -> None:
    """Give a recorded coordinator's inputs to a fresh one, and compare what both sent to workers."""
    from coordinator.recording import Recording
    from coordinator.recording import replay as replay_all
    from coordinator.service import make_registry

    source = Recording(recording)
    registry = make_registry(ServeConfig.model_validate_json(source.config))
    result = replay_all(source, registry)
    other = result.difference
    if other is None:
        print(f"the same: {result.num_events} events, {result.num_placements} placements")
        return
    kind = type(other.event).__name__
    ERR.print(f"different at event {other.index}, {kind} at {other.at:.6f} s:", markup=False)
    ERR.print("  recorded: " + ("; ".join(other.recorded) or "nothing"), markup=False)
    ERR.print("  replayed: " + ("; ".join(other.replayed) or "nothing"), markup=False)
    raise typer.Exit(1)
