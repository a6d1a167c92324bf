"""One step of a worker: answers written and prompts read together, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decode.run import DecodePlan, Turn
from pdserve.worker.compute import Work
from prefill.run import Chunk, PrefillPlan


@dataclass(frozen=True, slots=True)
class StepPlan:
    """At least one of the two. Their works, and the results, come in the order of `works`."""

    decode: DecodePlan | None
    prefill: PrefillPlan | None
    started: float

    @property
    def turns(self) -> Sequence[Turn]:
        return self.decode.turns if self.decode else ()

    @property
    def chunks(self) -> Sequence[Chunk]:
        return self.prefill.chunks if self.prefill else ()

    @property
    def num_tokens(self) -> int:
        """Computed for good: of guesses, none."""
        decoded = sum(turn.end - turn.start for turn in self.turns)
        return decoded + sum(chunk.end - chunk.start for chunk in self.chunks)

    def works(self) -> list[Work]:
        return [*(turn.work() for turn in self.turns), *(chunk.work() for chunk in self.chunks)]
