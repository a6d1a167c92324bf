"""What a worker takes new requests of, and whether it takes any: role, drains, the end of its process."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.messages import Drain, Message, Role, Undrain
from pdserve.worker.events import DrainAsked, UndrainAsked


@dataclass(slots=True)
class Duty:
    """One worker's. Changed by messages of coordinators and by its own process."""

    role: Role
    asked: bool = False
    """A coordinator wants it drained."""
    held: bool = False
    """Its own process does."""
    stopping: bool = False
    """Its process ends when it is empty, or its time is up."""

    @property
    def draining(self) -> bool:
        """It takes no new requests."""
        return self.asked or self.held

    def process(self, event: DrainAsked | UndrainAsked) -> None:
        match event:
            case DrainAsked(until=until):
                self.held, self.stopping = True, self.stopping or until is not None
            case UndrainAsked():
                self.asked = self.held = self.stopping = False

    def coordinator(self, message: Message) -> None:
        """`Undrain` does not take back what the worker's own process was told."""
        match message:
            case Drain():
                self.asked = True
            case Undrain():
                self.asked = self.held = self.stopping
            case _:
                pass
