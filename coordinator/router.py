"""Which workers get a request: decode first, then prefill. Explainable, and repeatable from a seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from coordinator.fleet import Fleet, WorkerState
from coordinator.policies import Candidate, Choice, Policy, make_policy
from pdserve.core.config import RoutingPolicy
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role


@dataclass(frozen=True, slots=True)
class Placement:
    decode: Choice
    prefill: Choice | None
    """None: the decode worker reads the prompt itself."""

    def __str__(self) -> str:
        prefill = "by the decode worker" if self.prefill is None else str(self.prefill)
        return f"decode {self.decode}; prefill {prefill}"


class Router:
    """One policy per model and role, so that turns and draws of one do not disturb another's."""

    def __init__(self, policy: RoutingPolicy, seed: int) -> None:
        self._policy, self._seed = policy, seed
        self._policies: dict[tuple[str, Role], Policy] = {}

    def place(
        self,
        fleet: Fleet,
        model: str,
        tokens: int,
        *,
        prefer: Placement | None = None,
        avoid: Collection[WorkerId] = (),
    ) -> Placement | None:
        """Workers for a prompt of `tokens`, or None while no decode worker takes requests.

        `prefer`: where the first sample of the same prompt went, taken again while possible. `avoid`: workers
        that failed this request before: of decode workers, taken only when there is no other; of prefill
        workers never, as the decode worker can read the prompt itself.
        """
        decoders = [w for w in fleet.of(model, Role.DECODE) if w.takes_decode()]
        if not decoders:
            return None
        readers = [w for w in fleet.of(model, Role.PREFILL) if not w.draining and w.id not in avoid]
        decode = self._choose(
            (model, Role.DECODE),
            decoders,
            lambda w: w.decode_load(tokens),
            prefer.decode if prefer else None,
            avoid,
        )
        if not readers:
            return Placement(decode, None)
        prefill = self._choose(
            (model, Role.PREFILL),
            readers,
            lambda w: w.prefill_wait_s(tokens),
            prefer.prefill if prefer else None,
            avoid,
        )
        return Placement(decode, prefill)

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
            self._policies[key] = make_policy(self._policy, f"{self._seed}/{key[0]}/{key[1]}")
        untried = [c for c in candidates if c.worker not in avoid]
        return self._policies[key].choose(untried or candidates)
