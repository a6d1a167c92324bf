"""How one worker is chosen among candidates with scores. A policy is a small class; see `Policy`."""

from __future__ import annotations

import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final

from coordinator.decisions import Candidate, Choice
from coordinator.fleet import WorkerState
from coordinator.pool import SAMPLE, Fits, Pool
from pdserve.core.config import RoutingPolicy
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId

_LEAST: Final = 4
"""Of the least loaded, who are shown beside the one that is taken."""


class Policy(ABC):
    """Chooses among candidates; one object per model and role, used from one thread.

    A policy of your own is a subclass in a module that the coordinator can import, named in the config as
    `coordinator.policy: my.module:MyPolicy`:

        class Greenest(Policy):
            def choose(self, candidates):
                best = min(candidates, key=lambda c: (c.violation, watts(c.worker), c.load))
                return Choice(best.worker, tuple(candidates), "least power in time")

    Same seed, same decisions: randomness comes from `self.rng` alone, and time from nowhere.
    """

    by_goal: ClassVar[bool] = True
    """A candidate's score puts predicted violations of targets before its load; False: it is its load."""
    by_prefix: ClassVar[bool] = True
    """Workers that have the beginning of the prompt in their cache are looked at too."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def draw(self, pool: Pool, fits: Fits) -> list[WorkerState]:
        """Who is looked at: everyone who fits, in a large pool a sample."""
        return pool.sample(SAMPLE, self.rng, fits)

    @abstractmethod
    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        """Pick one of `candidates`, which is not empty and sorted by worker id."""


class LeastLoaded(Policy):
    """The lowest load; the first by name among equals."""

    by_goal = False
    by_prefix = False
    reason = "least loaded"

    def draw(self, pool: Pool, fits: Fits) -> list[WorkerState]:
        return pool.least(_LEAST, fits)

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        best = min(candidates, key=lambda c: (c.score, c.worker))
        return Choice(best.worker, tuple(candidates), self.reason)


class PowerOfTwo(Policy):
    """The better of two drawn at random: near the best balance, without herding on stale scores.

    M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """

    by_goal = False
    by_prefix = False

    def draw(self, pool: Pool, fits: Fits) -> list[WorkerState]:
        return pool.sample(4, self.rng, fits)

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        if len(candidates) == 1:
            return Choice(candidates[0].worker, tuple(candidates), "the only one")
        one, two = self.rng.sample(list(candidates), 2)
        best = min(one, two, key=lambda c: c.score)
        return Choice(best.worker, tuple(candidates), f"better of {one.worker} and {two.worker}")


class LeastViolation(Policy):
    """The lowest score, which puts predicted violations before load (see `coordinator.sla`), then the longest
    prefix, then the fastest pair."""

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        best = min(candidates, key=lambda c: (c.score, -c.prefix_tokens, c.transfer_s, c.worker))
        return Choice(best.worker, tuple(candidates), "least predicted violation, then load")


class PrefixAware(Policy):
    """The longest beginning of the prompt in its cache, among those that are not much busier than another."""

    by_goal = False
    _BUSIER = 1.5
    _MORE = 0.1
    """Of load: so much above the least, and this, is not much."""

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        least = min(c.load for c in candidates)
        fair = [c for c in candidates if c.load <= self._BUSIER * least + self._MORE]
        best = min(fair, key=lambda c: (-c.prefix_tokens, c.score, c.worker))
        reason = "has most of the prompt" if best.prefix_tokens else "nobody has any of it; least loaded"
        return Choice(best.worker, tuple(candidates), reason)


class RoundRobin(Policy):
    """The next by name after the last one taken, also while workers come and go."""

    by_goal = False
    by_prefix = False

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._last = WorkerId("")

    def draw(self, pool: Pool, fits: Fits) -> list[WorkerState]:
        return pool.after(self._last, fits)

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        after = [c.worker for c in candidates if c.worker > self._last]
        self._last = after[0] if after else candidates[0].worker
        return Choice(self._last, tuple(candidates), "next in turn")


class Random(Policy):
    by_goal = False
    by_prefix = False

    def draw(self, pool: Pool, fits: Fits) -> list[WorkerState]:
        return pool.sample(4, self.rng, fits)

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        return Choice(self.rng.choice(list(candidates)).worker, tuple(candidates), "drawn at random")


_NAMED: Final[dict[str, type[Policy]]] = {
    RoutingPolicy.POWER_OF_TWO: PowerOfTwo,
    RoutingPolicy.LEAST_LOADED: LeastLoaded,
    RoutingPolicy.PREFIX_AWARE: PrefixAware,
    RoutingPolicy.SLA: LeastViolation,
    RoutingPolicy.ROUND_ROBIN: RoundRobin,
    RoutingPolicy.RANDOM: Random,
}


def policy_class(name: str) -> type[Policy]:
    """The class of a named policy, or of one given as `module:Class`. Raises `ConfigError`."""
    found = _NAMED.get(name)
    if found is not None:
        return found
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        known = ", ".join(sorted(_NAMED))
        raise ConfigError(f"coordinator.policy: {name!r} is none of {known}, nor module:Class")
    try:
        custom = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"coordinator.policy: {name!r} cannot be imported: {error}") from error
    if not (isinstance(custom, type) and issubclass(custom, Policy)):
        raise ConfigError(f"coordinator.policy: {name!r} is no subclass of coordinator.policies.Policy")
    return custom


def make_policy(name: str, seed: str) -> Policy:
    """A policy of its own; the same `seed` and the same calls give the same choices."""
    return policy_class(name)(random.Random(seed))
