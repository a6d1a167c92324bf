"""What modelled workers of both kinds share. They speak the protocol in full, and take a profile's time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from coordinator.simulator.profile import Profile
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import Down, FinishReason, Heartbeat, PrefillDone, RequestSpec, Up, WorkerInfo
from pdserve.core.worker_state import BlockCounts


class Ports(Protocol):
    """What a modelled worker can do to the world. Its own death undoes what it scheduled."""

    def later(self, worker: Worker, delay_s: float, act: Callable[[float], None]) -> None: ...

    def tell(self, worker: Worker, messages: Sequence[Up], now: float) -> None:
        """One frame to the coordinator."""
        ...

    def push(
        self, worker: Worker, to: WorkerId, attempt: AttemptId, now: float, *, written: int | None
    ) -> None:
        """written: tokens of an answer that moves, for it to go on after; None: it begins there."""
        ...


class Worker:
    def __init__(self, info: WorkerInfo, profile: Profile, ports: Ports) -> None:
        self.info, self.profile, self._ports = info, profile, ports
        self.steps = 0.0
        self.draining = False

    def handle(self, message: Down, now: float) -> None:
        raise NotImplementedError

    def beat(self, now: float) -> Heartbeat:
        raise NotImplementedError

    @property
    def empty(self) -> bool:
        """Nothing is left here of any request."""
        raise NotImplementedError

    def died(self, now: float) -> list[Up]:
        """What it had told before it died."""
        return []

    def _heartbeat(
        self,
        *,
        held: int,
        waiting: int,
        running: int,
        tokens: float,
        step_s: float,
        hits: tuple[int, int] = (0, 0),
    ) -> Heartbeat:
        total = self.info.num_blocks
        return Heartbeat(
            worker=self.info.worker,
            epoch=self.info.epoch,
            blocks=BlockCounts(total=total, free=total - held, held=held, cached=0, quarantined=0),
            waiting=waiting,
            running=running,
            waiting_tokens=round(tokens),
            step_s=step_s,
            tokens_per_s=1 / self.profile.prefill_token,
            prefix_hit_tokens=hits[0],
            prefix_query_tokens=hits[1],
            steps=int(self.steps),
            draining=self.draining,
        )


def num_new_tokens(spec: RequestSpec) -> int:
    """How long the answer still gets: in a simulation, as long as it may."""
    return max(spec.sampling.max_tokens - spec.num_output_tokens, 1)


def prefill_done(spec: RequestSpec, compute_s: float) -> PrefillDone:
    return PrefillDone(
        attempt=spec.attempt,
        token=0,
        logprobs=None,
        prompt_logprobs=[],
        finish_reason=FinishReason.LENGTH if num_new_tokens(spec) == 1 else None,
        compute_s=compute_s,
    )
