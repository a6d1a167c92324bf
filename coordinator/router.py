"""Which workers get a request: decode first, then who reads it, or whether that one keeps it whole.

Explainable, and repeatable from a seed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from coordinator.decisions import Candidate, Choice, Placement, Rejected, Route
from coordinator.fleet import Fleet, WorkerState
from coordinator.keeping import Expected, keeping_pays, kept_route, takes_whole
from coordinator.policies import Policy, make_policy, policy_class
from coordinator.pool import SAMPLE, WHOLE, Fits, Pool
from coordinator.routes import exposed_s, local_pays, local_route, remote_route
from coordinator.sla import EVIDENCE, VIOLATION_WEIGHT, Forecast, Goal, decode_score, prefill_score
from pdserve.core.config import LocalPrefill, WholeOnPrefill
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role

NO_GOAL: Final = Goal()
_HOLDERS: Final = 4
"""Of a prompt's beginning, who are looked at besides those that were drawn."""


@dataclass(slots=True, kw_only=True)
class _Ask:
    """One request to place."""

    model: str
    tokens: int
    goal: Goal
    prefer: Placement | None
    avoid: Collection[WorkerId]
    cached: Mapping[WorkerId, int]
    """Tokens of the prompt that are likely in a worker's prefix cache."""
    rejected: list[Rejected]
    expected: Expected | None
    """None: no prefill worker may keep it."""


class Router:
    """One policy per model and role, so that turns and draws of one do not disturb another's."""

    def __init__(
        self,
        policy: str,
        seed: int,
        local_prefill: LocalPrefill = LocalPrefill.AUTO,
        whole_on_prefill: WholeOnPrefill = WholeOnPrefill.NEVER,
    ) -> None:
        """policy: a `RoutingPolicy`, or `module:Class` of one's own; raises `ConfigError` for others."""
        policy_class(policy)
        self.policy: Final = policy
        self.local_prefill: Final = local_prefill
        self.whole_on_prefill: Final = whole_on_prefill
        self._seed = seed
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
        cached: Mapping[WorkerId, int] = MappingProxyType({}),
        expected: Expected | None = None,
    ) -> Placement | None:
        """Workers for a prompt of `tokens`, or None while no decode worker takes requests.

        A prefill worker may keep it whole (`coordinator.keeping`): it is then named as the decode worker.

        `prefer`: where the first sample of the same prompt went, taken again while possible. `avoid`: workers
        that failed this request before: of decode workers, taken only when there is no other; of prefill
        workers never, as the decode worker can read the prompt itself. `prefix_at`: a prefill worker that has
        read this prompt before, taken unless it is busier than another would be with reading it all.
        `cached`: tokens of the prompt that are likely in a worker's prefix cache. `expected`: without it no
        prefill worker keeps it.
        """
        has = dict(cached)
        if prefix_at is not None:
            has[prefix_at] = tokens
        if prefer is not None:
            # The first sample has left the prompt in the caches of its workers.
            has |= {choice.worker: tokens for choice in (prefer.decode, prefer.prefill) if choice}
        if self.whole_on_prefill is WholeOnPrefill.NEVER or self.local_prefill is LocalPrefill.ALWAYS:
            expected = None
        ask = _Ask(
            model=model,
            tokens=tokens,
            goal=goal,
            prefer=prefer,
            avoid=avoid,
            cached=has,
            rejected=[],
            expected=expected,
        )
        keeper = self._keeper_of(fleet, prefer, tokens)
        if keeper is not None:
            return self._keep(ask, keeper, (), "follows the first sample")
        prefills = fleet.pool(model, Role.PREFILL)
        reads = not prefills.any(lambda w: w.takes_prompts() and w.id not in avoid)
        decode = self._choose_decode(fleet, ask, reads=reads or self.local_prefill is LocalPrefill.ALWAYS)
        if decode is None:
            keeper = self._choose_keeper(fleet, ask, idle=True)
            return None if keeper is None else self._keep(ask, keeper, (), "no decode worker has room")
        if reads or self.local_prefill is LocalPrefill.ALWAYS:
            return self._local(fleet, ask, decode, "there is no other" if reads else "as configured")
        prefill = self._choose_prefill(fleet, ask, prefix_at, decode.worker)
        if prefill is None:
            return self._local(fleet, ask, decode, "no prefill worker's KV gets there")
        return self._kept_if_cheaper(fleet, ask, self._cheaper(fleet, ask, decode, prefill))

    def place_move(self, fleet: Fleet, source: WorkerState, tokens: int) -> Choice | None:
        """A decode worker with room, and with blocks of the same size, for a request of `source`; or None."""
        targets = fleet.pool(source.model, Role.DECODE).least(
            1,
            lambda worker: (
                worker.takes_decode()
                and worker.id != source.id
                and worker.info.block_tokens == source.info.block_tokens
            ),
        )
        candidates = tuple(_by_load(worker, worker.decode_load(tokens)) for worker in targets)
        if not candidates:
            return None
        return Choice(min(candidates, key=lambda c: (c.score, c.worker)).worker, candidates, "least loaded")

    def forecast(self, placement: Placement) -> Forecast | None:
        """What a placement is predicted to come to, from when it was made on."""
        route = placement.route
        if route is None:
            return None
        return Forecast(route.ttft_s, route.tpot_s, route.ttft_std_s, route.tpot_std_s)

    def readers(self, fleet: Fleet, model: str, count: int = SAMPLE) -> list[WorkerState]:
        """Who may read a prompt: prefill workers, and decode workers that do, or where there are no others.

        Up to `count` of each where there are many, the least busy. Decode workers that answer with targets
        are left out, as what they promised comes first; so are those of which too little is known, where
        there are others.
        """
        prefills, decodes = fleet.pool(model, Role.PREFILL), fleet.pool(model, Role.DECODE)
        found: list[WorkerState] = []
        if self.local_prefill is not LocalPrefill.ALWAYS:
            found = prefills.least(count, _reads)
        if not found:
            return decodes.least(count, _reads)
        if self.local_prefill is LocalPrefill.AUTO:
            found += decodes.least(
                count,
                lambda w: not w.has_tpot_targets and w.takes_decode() and w.latency.prefill.count >= EVIDENCE,
                thorough=False,
            )
        return found

    # --- one worker of a role -----------------------------------------------------------------------

    def _choose_decode(self, fleet: Fleet, ask: _Ask, *, reads: bool) -> Choice | None:
        pool = fleet.pool(ask.model, Role.DECODE)
        policy = self._policy(ask.model, Role.DECODE)

        def scored(worker: WorkerState) -> Candidate:
            cached = ask.cached.get(worker.id, 0)
            if policy.by_goal:
                violation, load = decode_score(worker, ask.tokens, ask.goal, reads=reads, cached=cached)
            else:
                violation, load = 0.0, worker.decode_load(ask.tokens)
            return Candidate(worker.id, VIOLATION_WEIGHT * violation + load, violation, load, cached)

        followed = self._followed(
            fleet,
            ask.prefer.decode if ask.prefer else None,
            lambda w: w.takes_decode() and w.info.role is Role.DECODE,
        )
        if followed is not None:
            return Choice(followed.id, (scored(followed),), "follows the first sample")
        looked_at = self._draw(policy, pool, ask, lambda w: w.takes_decode() and w.id not in ask.avoid)
        looked_at = looked_at or self._draw(policy, pool, ask, lambda w: w.takes_decode())
        self._tell_rejected(pool, ask, looked_at)
        return policy.choose([scored(worker) for worker in looked_at]) if looked_at else None

    def _choose_prefill(
        self, fleet: Fleet, ask: _Ask, prefix_at: WorkerId | None, decode: WorkerId
    ) -> Choice | None:
        pool = fleet.pool(ask.model, Role.PREFILL)
        policy = self._policy(ask.model, Role.PREFILL)
        writer = fleet.get(decode)
        size_bytes = 0
        if writer is not None:
            size_bytes = max(ask.tokens - ask.cached.get(decode, 0), 0) * writer.kv_token_bytes

        def fits(worker: WorkerState) -> bool:
            usable = worker.takes_prompts() and worker.id not in ask.avoid
            return usable and not fleet.pairs.avoids(worker.id, decode)

        def scored(worker: WorkerState) -> Candidate:
            cached = ask.cached.get(worker.id, 0)
            if policy.by_goal:
                violation, load = prefill_score(worker, ask.tokens, ask.goal, cached)
            else:
                known = policy.by_prefix or worker.id == prefix_at
                left = max(ask.tokens - cached, 0) if known else ask.tokens
                violation, load = 0.0, worker.prefill_wait_s(left)
            score = VIOLATION_WEIGHT * violation + load
            if not (policy.by_goal or policy.by_prefix):
                return Candidate(worker.id, score, violation, load, cached)
            transfer_s = exposed_s(fleet.links, worker, decode, size_bytes)
            return Candidate(worker.id, score + transfer_s, violation, load, cached, transfer_s)

        followed = self._followed(fleet, ask.prefer.prefill if ask.prefer else None, fits)
        if followed is not None:
            return Choice(followed.id, (scored(followed),), "follows the first sample")
        looked_at = self._draw(policy, pool, ask, fits)
        again = fleet.get(prefix_at)
        if again is not None and fits(again):
            others = [worker for worker in looked_at if worker is not again]
            soonest_s = min((worker.prefill_wait_s(ask.tokens) for worker in others), default=float("inf"))
            if again.prefill_wait_s(0) <= soonest_s:
                candidates = tuple(scored(worker) for worker in (again, *others))
                return Choice(again.id, candidates, "has read its prompt")
        self._tell_rejected(pool, ask, looked_at)
        return policy.choose([scored(worker) for worker in looked_at]) if looked_at else None

    def _followed(self, fleet: Fleet, choice: Choice | None, fits: Fits) -> WorkerState | None:
        worker = None if choice is None else fleet.get(choice.worker)
        return worker if worker is not None and fits(worker) else None

    def _draw(self, policy: Policy, pool: Pool, ask: _Ask, fits: Fits) -> list[WorkerState]:
        """Who is looked at, by name: whom the policy draws, and those that have the most of the prompt."""
        drawn = policy.draw(pool, fits)
        if not policy.by_prefix or not ask.cached:
            return drawn
        there = {worker.id for worker in drawn}
        more: list[WorkerState] = []
        for name in sorted(ask.cached, key=lambda name: (-ask.cached[name], name)):
            worker = None if name in there else pool.find(name)
            if worker is not None and fits(worker):
                more.append(worker)
                if len(more) == _HOLDERS:
                    break
        return sorted([*drawn, *more], key=lambda w: w.id) if more else drawn

    def _tell_rejected(self, pool: Pool, ask: _Ask, looked_at: list[WorkerState]) -> None:
        """Why not the others, where there are few enough for everyone to have been looked at."""
        if len(looked_at) == len(pool.workers) or len(pool.workers) > WHOLE:
            return
        taken = {worker.id for worker in looked_at}
        for worker in pool.workers:
            if worker.id not in taken:
                why = worker.why_not() or ("it failed this request before" if worker.id in ask.avoid else "")
                ask.rejected.append(Rejected(worker.id, why or "the policy did not look at it"))

    def _policy(self, model: str, role: Role) -> Policy:
        policy = self._policies.get((model, role))
        if policy is None:
            policy = self._policies[(model, role)] = make_policy(self.policy, f"{self._seed}/{model}/{role}")
        return policy

    # --- who reads the prompt -----------------------------------------------------------------------

    def _local(self, fleet: Fleet, ask: _Ask, decode: Choice, why: str) -> Placement:
        worker = fleet.get(decode.worker)
        assert worker is not None
        cached = ask.cached.get(worker.id, 0)
        route = local_route(worker, ask.tokens, ask.goal, cached=cached, like=None)
        return Placement(decode, None, (route,), tuple(ask.rejected), why)

    def _cheaper(self, fleet: Fleet, ask: _Ask, decode: Choice, prefill: Choice) -> Placement:
        """The route that costs less: the prefill worker reads the prompt, or the decode worker itself."""
        writer, reader = fleet.get(decode.worker), fleet.get(prefill.worker)
        assert writer is not None
        assert reader is not None
        here = ask.cached.get(writer.id, 0)
        cached = ask.cached.get(reader.id, 0)
        remote = remote_route(
            fleet.links, reader, writer, ask.tokens, ask.goal, cached=cached, cached_at_decode=here
        )
        rejected = tuple(ask.rejected)
        if self.local_prefill is LocalPrefill.NEVER:
            return Placement(decode, prefill, (remote,), rejected, "as configured")
        local = local_route(writer, ask.tokens, ask.goal, cached=here, like=reader)
        if local_pays(local, remote):
            return Placement(decode, None, (local, remote), rejected, "cheaper to read there")
        return Placement(decode, prefill, (remote, local), rejected, "cheaper to move its KV")

    # --- whether the prefill worker keeps it --------------------------------------------------------

    def _choose_keeper(self, fleet: Fleet, ask: _Ask, *, idle: bool) -> WorkerState | None:
        """The prefill worker that keeps the least so far, then reads the least; None: none has room.

        idle: one that reads nothing, or none.
        """
        if ask.expected is None:
            return None

        def fits(worker: WorkerState) -> bool:
            free = not (idle and worker.prefill_left)
            return free and worker.id not in ask.avoid and takes_whole(worker, ask.tokens)

        found = fleet.pool(ask.model, Role.PREFILL).least(_HOLDERS, fits, thorough=idle)
        return min(found, key=lambda w: (w.num_placed, w.prefill_wait_s(0), w.id), default=None)

    def _keeper_of(self, fleet: Fleet, prefer: Placement | None, tokens: int) -> WorkerState | None:
        """The prefill worker that keeps the first sample, if it takes another."""
        worker = None if prefer is None else fleet.get(prefer.decode.worker)
        keeps = worker is not None and worker.info.role is Role.PREFILL and takes_whole(worker, tokens)
        return worker if keeps else None

    def _kept_if_cheaper(self, fleet: Fleet, ask: _Ask, other: Placement) -> Placement:
        keeper, writer = self._choose_keeper(fleet, ask, idle=False), fleet.get(other.decode.worker)
        if keeper is None or ask.expected is None or writer is None or other.route is None:
            return other
        kept = kept_route(keeper, ask.tokens, ask.goal, cached=ask.cached.get(keeper.id, 0))
        readers = len(fleet.pool(ask.model, Role.PREFILL).workers)
        if keeping_pays(
            kept,
            other.route,
            keeper=keeper,
            writer=writer,
            tokens=ask.tokens,
            expected=ask.expected,
            num_readers=readers,
        ):
            return self._keep(ask, keeper, other.routes, "cheaper to keep it whole", kept)
        return replace(other, routes=(*other.routes, kept))

    def _keep(
        self, ask: _Ask, keeper: WorkerState, others: tuple[Route, ...], why: str, kept: Route | None = None
    ) -> Placement:
        cached = ask.cached.get(keeper.id, 0)
        route = kept or kept_route(keeper, ask.tokens, ask.goal, cached=cached)
        candidate = Candidate(keeper.id, route.cost, route.violation, keeper.decode_load(ask.tokens), cached)
        return Placement(
            Choice(keeper.id, (candidate,), why), None, (route, *others), tuple(ask.rejected), why
        )


def _reads(worker: WorkerState) -> bool:
    return worker.takes_prompts()


def _by_load(worker: WorkerState, load: float) -> Candidate:
    return Candidate(worker.id, load, 0.0, load)
