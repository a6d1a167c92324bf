"""Which workers get a request: decode first, then prefill. Explainable, and repeatable from a seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from coordinator.fleet import Fleet, WorkerState
from coordinator.policies import Candidate, Choice, LeastLoaded, Policy, make_policy
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
        prefix_at: WorkerId | None = None,
        avoid: Collection[WorkerId] = (),
    ) -> Placement | None:
        """Workers for a prompt of `tokens`, or None while no decode worker takes requests.

        `prefer`: where the first sample of the same prompt went, taken again while possible. `avoid`: workers
        that failed this request before: of decode workers, taken only when there is no other; of prefill
        workers never, as the decode worker can read the prompt itself. `prefix_at`: a prefill worker that has
        read this prompt before, taken unless it is busier than another would be with reading it all.
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
        again = next((w for w in readers if w.id == prefix_at), None)
        if again is not None and again.prefill_wait_s(0) <= min(w.prefill_wait_s(tokens) for w in readers):
            scores = tuple(Candidate(w.id, w.prefill_wait_s(0 if w is again else tokens)) for w in readers)
            return Placement(decode, Choice(again.id, scores, "has read its prompt"))
        prefill = self._choose(
            (model, Role.PREFILL),
            readers,
            lambda w: w.prefill_wait_s(tokens),
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
