"""Striking in the very event that begins a phase: phases can last less than a millisecond."""

from __future__ import annotations

from coordinator.registry import Registry
from pdserve.core.lifecycle import Phase


def has_entered(registry: Registry, phase: Phase) -> bool:
    """Whether a living request is in `phase`, or was: one event may lead through several."""
    return bool(registry.phases().get(phase)) or any(
        entered is phase for flight in registry._book.flights.values() for _, entered in flight.record.history
    )
