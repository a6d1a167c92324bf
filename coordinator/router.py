"""Which workers get a request: decode first, then prefill. Explainable, and repeatable from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.fleet import Fleet, WorkerState
from coordinator.policies import Candidate, Choice, LeastLoaded, Policy, make_policy
from coordinator.sla import Forecast, Goal, decode_score, forecast, prefill_score
from pdserve.core.config import RoutingPolicy
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role

SAMPLE: Final = 32
"""Workers of a role that policy `sla` looks at for one request; where there are more, drawn at random. The
best of d draws is within log log n / log d of the best of all (Azar et al., "Balanced Allocations", 1999)."""


@dataclass(frozen=True, slots=True)
class Placement:
    decode: Choice
    prefill: Choice | None
    """None: the decode worker reads the prompt itself."""
    forecast: Forecast | None = None
    """What was predicted for it, from then on."""

    def __str__(self) -> str:
        prefill = "by the decode worker" if self.prefill is None else str(self.prefill)
        return f"decode {self.decode}; prefill {prefill}"


NO_GOAL: Final = Goal()


class Router:
    """One policy per model and role, so that turns and draws of one do not disturb another's."""

    def __init__(self, policy: RoutingPolicy, seed: int) -> None:
        self.policy: Final = policy
        self._seed = seed
        self._rng = random.Random(f"{seed}/sample")
        self._policies: dict[tuple[str, Role], Policy] = {}

    def place(
        self,
        fleet: Fleet,
        model: str,
        tokens: int,
        *,
        goal: Goal = NO_GOAL,
        prefer: Placement | None = None,
        prefix_at: WorkerId | None = None,
        avoid: Collection[WorkerId] = (),
    ) -> Placement | None:
        """Workers for a prompt of `tokens`, or None while no decode worker takes requests.

        `prefer`: where the first sample of the same prompt went, taken again while possible. `avoid`: workers
        that failed this request before: of decode workers, taken only when there is no other; of prefill
        workers never, as the decode worker can read the prompt itself. `prefix_at`: a prefill worker that has
        read this prompt before, taken unless it is busier than another would be with reading it all.
        """
        decoders = self._pool(fleet, model, Role.DECODE, lambda w: w.takes_decode())
        if not decoders:
            return None
        readers = self._pool(
            fleet, model, Role.PREFILL, lambda w: not w.draining and w.id not in avoid, prefer
        )
        decode = self._choose(
            (model, Role.DECODE),
            decoders,
            lambda w: (
                decode_score(w, tokens, goal, reads=not readers) if self._by_goal else w.decode_load(tokens)
            ),
            prefer.decode if prefer else None,
            avoid,
        )
        if not readers:
            return Placement(decode, None)
        again = next((w for w in readers if w.id == prefix_at), None)
        if again is not None and again.prefill_wait_s(0) <= min(w.prefill_wait_s(tokens) for w in readers):
            scores = tuple(Candidate(w.id, w.prefill_wait_s(0 if w is again else tokens)) for w in readers)
            return Placement(decode, Choice(again.id, scores, "has read its prompt"))
        prefill = self._choose(
            (model, Role.PREFILL),
            readers,
            lambda w: prefill_score(w, tokens, goal) if self._by_goal else w.prefill_wait_s(tokens),
            prefer.prefill if prefer else None,
            avoid,
        )
        return Placement(decode, prefill)

    def place_move(self, fleet: Fleet, source: WorkerState, tokens: int) -> Choice | None:
        """A decode worker with room, and with blocks of the same size, for a request of `source`; or None."""
        targets = [
            worker
            for worker in fleet.of(source.model, Role.DECODE)
            if worker.takes_decode()
            and worker.id != source.id
            and worker.info.block_tokens == source.info.block_tokens
        ]
        if not targets:
            return None
        return LeastLoaded().choose([Candidate(w.id, w.decode_load(tokens)) for w in targets])

    def forecast(self, fleet: Fleet, placement: Placement, tokens: int, goal: Goal) -> Forecast | None:
        """What a placement is predicted to come to; before the request is counted as load there."""
        decode = fleet.get(placement.decode.worker)
        reader = None if placement.prefill is None else fleet.get(placement.prefill.worker)
        return None if decode is None else forecast(decode, reader, tokens, goal)

    def readers(self, fleet: Fleet, model: str) -> list[WorkerState]:
        """Who may read a prompt: prefill workers, or decode workers where there are none."""
        for role in (Role.PREFILL, Role.DECODE):
            found = self._pool(fleet, model, role, lambda w: not w.draining)
            if found:
                return found
        return []

    @property
    def _by_goal(self) -> bool:
        return self.policy is RoutingPolicy.SLA

    def _pool(
        self,
        fleet: Fleet,
        model: str,
        role: Role,
        fits: Callable[[WorkerState], bool],
        prefer: Placement | None = None,
    ) -> list[WorkerState]:
        """Who is looked at: everyone who fits, or a sample of them where the policy is content with one."""
        if self._by_goal and prefer is None:
            drawn = [w for w in fleet.some(model, role, SAMPLE, self._rng) if fits(w)]
            if drawn:
                return drawn
        return [w for w in fleet.of(model, role) if fits(w)]

    def _choose(
        self,
        key: tuple[str, Role],
        workers: Sequence[WorkerState],
        score: Callable[[WorkerState], float],
        prefer: Choice | None,
        avoid: Collection[WorkerId],
    ) -> Choice:
        candidates = [Candidate(w.id, score(w)) for w in workers]
        if prefer is not None and any(c.worker == prefer.worker for c in candidates):
            return Choice(prefer.worker, tuple(candidates), "follows the first sample")
        if key not in self._policies:
            self._policies[key] = make_policy(self.policy, f"{self._seed}/{key[0]}/{key[1]}")
        untried = [c for c in candidates if c.worker not in avoid]
        return self._policies[key].choose(untried or candidates)
