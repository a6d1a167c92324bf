"""Everything the registry knows, in one place. Only the registry's own modules change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from coordinator.decisions import Decision, DecisionLog, Placement
from coordinator.events import NewRequest
from coordinator.fetch_tally import FetchTally
from coordinator.fleet import Fleet
from coordinator.flight import Attempt, Flight
from coordinator.keeping import Expected
from coordinator.prefix_index import PrefixIndex
from coordinator.promises import Margins
from coordinator.pushes import PushLedger
from coordinator.router import Router
from coordinator.sla import Goal
from coordinator.stories import Stories
from coordinator.tenants import Tenants
from coordinator.tier_hits import tier_worth
from coordinator.waiting import WaitingQueue
from pdserve.core.config import Admission
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import Orphaned, Role
from pdserve.core.prefix import PrefixHashes, key_of
from pdserve.core.sla_settings import TenantSettings

if TYPE_CHECKING:
    from coordinator.fetching import Fetch

_USUAL_ANSWER: Final = 256.0
"""Tokens that an answer is expected to have before any has ended."""
_HOLD_S: Final = 0.1
"""After which a request that waits for others' targets is looked at again, though nothing has ended."""


class Held(NamedTuple):
    """Who waits for running answers to end, and when to look again: then, or after the next release."""

    request: RequestId
    until: float
    releases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    max_queued_requests: int
    max_attempts: int
    lease_s: float
    transfer_deadline_s: float
    admission: Admission = Admission.OFF
    tenants: Mapping[str, TenantSettings] = field(default_factory=dict)
    queue_ttl_s: float | None = None
    """A request that has waited this long without having begun is refused. None: at its deadline."""
    preemption: bool = True
    max_preemptions: int = 3
    fetch_prefixes: bool = False
    """What the reader of a prompt lacks of it is asked of a worker that has it, where that is sooner."""
    explain_last: int = 1024
    """How many requests are remembered for who asks later."""
    no_workers_wait_s: float = 30.0
    """How long a request waits for a decode worker to appear (again) while there is none."""
    drain_timeout_s: float = 120.0
    """How long requests of a drained decode worker wait for room elsewhere before they start over."""
    settle_wait_s: float = 0.05
    """How long the end of an answer waits for the figures of its transfer, where they come after it."""


@dataclass(slots=True, kw_only=True)
class Book:
    settings: RegistrySettings
    router: Router
    fleet: Fleet = field(default_factory=Fleet)
    flights: dict[RequestId, Flight] = field(default_factory=dict)
    waiting: dict[str, WaitingQueue] = field(default_factory=dict)
    followers: dict[RequestId, list[RequestId]] = field(default_factory=dict)
    """Samples that wait until the first sample of their prompt has left its KV where they can share it."""
    pushes: PushLedger = field(default_factory=PushLedger)
    ending: dict[RequestId, float] = field(default_factory=dict)
    """Answers whose end waits for the figures of their transfer, and until when."""
    leased: dict[RequestId, float] = field(default_factory=dict)
    """Requests whose decode worker awaits KV, and when their lease was renewed last."""
    orphans: dict[WorkerId, list[tuple[WorkerId, Orphaned]]] = field(default_factory=dict)
    """By who may still write: decode workers with blocks in quarantine, until the writer can be asked."""
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    """Who has which prompts' beginnings cached, as far as workers say."""
    tiers: PrefixIndex = field(default_factory=PrefixIndex)
    """Who has them in tiers below the pool."""
    fetches: dict[AttemptId, Fetch] = field(default_factory=dict)
    """Beginnings of prompts that are on their way between workers, and requests that wait for them."""
    roles_given: dict[WorkerId, Role] = field(default_factory=dict)
    """Which role each worker was last told to take up: its successors take it up too."""
    num_fetches: int = 0
    """Since start."""
    fetched: FetchTally = field(default_factory=FetchTally)
    decisions: DecisionLog = field(default_factory=DecisionLog)
    """Why requests went where they went."""
    expiries: list[tuple[float, int, RequestId]] = field(default_factory=list)
    """A heap: when requests that have not begun by then are refused."""
    held: dict[str, Held] = field(default_factory=dict)
    """By model: the first in turn, where it waits for running answers to end, not for a place."""
    releases: int = 0
    """How often a place may have become free."""
    tenants: Tenants = field(init=False)
    stories: Stories = field(init=False)
    _answers: dict[tuple[str, str], float] = field(default_factory=dict)
    """By model and service class, and by model alone (""): mean length of the answers of late."""
    margins: dict[str, Margins] = field(default_factory=dict)
    """By model: how far its predictions are trusted."""
    draining: dict[WorkerId, None] = field(default_factory=dict)
    """Workers that are being drained, in the order in which they began: looked at on every event."""
    no_decode_since: dict[str, float] = field(default_factory=dict)
    _gap_s: float = 1.0
    last_end: float | None = None

    def __post_init__(self) -> None:
        self.tenants = Tenants(self.settings.tenants)
        self.stories = Stories(self.settings.explain_last)
        self.decisions = DecisionLog(max(self.settings.explain_last, 1))

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.waiting.values())) + sum(map(len, self.followers.values()))

    def enqueue(self, flight: Flight) -> None:
        request = flight.request
        queue = self.queue_of(request.model)
        if flight.tag is None:
            weight = self.tenants.weight(request.tenant)
            flight.tag = queue.tag(request.priority, request.tenant, self.cost(request), weight=weight)
        queue.push(
            flight.id, priority=request.priority, order=flight.order, tag=flight.tag, tenant=request.tenant
        )

    def hold(self, flight: Flight, now: float) -> None:
        """Its place would cost others their targets: look again soon, or when something has ended."""
        if flight.request.model not in self.held or self.held[flight.request.model].request != flight.id:
            flight.note(now, "waits: answers that run would miss their TPOT targets, or it its own")
        self.held[flight.request.model] = Held(flight.id, now + _HOLD_S, self.releases)

    def is_held(self, flight: Flight, now: float) -> bool:
        held = self.held.get(flight.request.model)
        return (
            held is not None
            and held.request == flight.id
            and now < held.until
            and (held.releases == self.releases)
        )

    def margins_of(self, model: str) -> Margins:
        margins = self.margins.get(model)
        if margins is None:
            margins = self.margins[model] = Margins()
        return margins

    def queue_of(self, model: str) -> WaitingQueue:
        return self.waiting.setdefault(model, WaitingQueue())

    def cost(self, request: NewRequest) -> float:
        """Tokens of the prompt and of the answer that is to be expected."""
        usual = self._answers.get((request.model, ""), _USUAL_ANSWER)
        return len(request.tokens) + min(usual, request.sampling.max_tokens)

    def expected(self, flight: Flight) -> Expected:
        """What is still to be written of an answer, and how many requests come meanwhile."""
        request, done = flight.request, len(flight.output)
        most = max(request.sampling.max_tokens - done, 1)
        usual = self._answers.get((request.model, request.sla_class), float(most))
        # One that has come further than usual is an unusual one.
        left = usual - done if done < usual else usual
        least = most if request.sampling.ignore_eos else max(request.sampling.min_tokens - done, 1)
        return Expected(answer_tokens=min(max(left, least), most), requests_per_s=self.ended_per_s)

    def settle(self, flight: Flight, now: float) -> None:
        """A request that was charged to its tenant has ended: what it used counts from now on."""
        if flight.charged is None:
            return
        request, used = flight.request, len(flight.request.tokens) + len(flight.output)
        self.tenants.ended(request.tenant, charged=flight.charged, used=used, now=now)
        weight, more = self.tenants.weight(request.tenant), used - flight.charged
        self.queue_of(request.model).settle(request.priority, request.tenant, more, weight=weight)
        if flight.output:
            for kind in {(request.model, ""), (request.model, request.sla_class)}:
                usual = self._answers.get(kind, float(len(flight.output)))
                self._answers[kind] = usual + 0.05 * (len(flight.output) - usual)

    def cached_tokens(self, flight: Flight) -> dict[WorkerId, int]:
        """Of its tokens, how many workers likely need not compute; others none, or less.

        What lies in a worker's tiers counts for less than it is (`coordinator.tier_hits`).
        """
        cached = self.pool_tokens(flight)
        if not self.tiers.num_blocks:
            return cached
        keys, size = self._keys(flight)
        colocated = not self.fleet.pool(flight.request.model, Role.PREFILL).workers
        for worker, blocks in self.prefixes.hits(keys, self.tiers).items():
            here, state = cached.get(worker, 0), self.fleet.get(worker)
            # A decode worker to which KV is pushed does not look into its tiers.
            if state is not None and (state.info.role is Role.PREFILL or colocated):
                cached[worker] = here + tier_worth(state, here, blocks * size)
        return cached

    def pool_tokens(self, flight: Flight) -> dict[WorkerId, int]:
        """Of its tokens, how many workers likely have in their prefix caches; others have none, or less."""
        if not self.prefixes.num_blocks:
            return {}
        keys, size = self._keys(flight)
        return {worker: blocks * size for worker, blocks in self.prefixes.hits(keys).items()}

    def _keys(self, flight: Flight) -> tuple[list[int], int]:
        """Of the blocks of its tokens that may be cached, and tokens of a block."""
        decoders = self.fleet.pool(flight.request.model, Role.DECODE).workers
        if not decoders or flight.request.sampling.prompt_logprobs is not None:
            return [], 0
        size = decoders[0].info.block_tokens
        if flight.prefix_hashes is None:
            flight.prefix_hashes = PrefixHashes(flight.request.cache_salt, size)
        hashes = flight.prefix_hashes.of(flight.request.tokens + flight.output)
        # The last token is always computed: its logits are needed.
        return [key_of(digest) for digest in hashes[: (flight.num_tokens - 1) // size]], size

    def decided(self, flight: Flight, placement: Placement, goal: Goal, now: float) -> None:
        """Keep why, for who asks later."""
        if flight.story is not None:
            flight.story.placed(self.fleet, placement, flight.num_tokens, goal)
        self.decisions.add(
            Decision(
                request=flight.id,
                attempt=flight.record.attempt,
                at=now,
                model=flight.request.model,
                tokens=flight.num_tokens,
                policy=str(self.router.policy),
                ttft_target_s=goal.ttft_s,
                tpot_target_s=goal.tpot_s,
                placement=placement,
            )
        )

    def note_draining(self, worker: WorkerId) -> None:
        """After an event of this worker, which alone may have begun or ended to drain by it."""
        state = self.fleet.get(worker)
        if state is not None and state.draining:
            self.draining.setdefault(worker)
        else:
            self.draining.pop(worker, None)

    def release(self, attempt: Attempt) -> None:
        """Stop counting an attempt as load of its workers."""
        self.releases += 1
        for worker in {attempt.decode, attempt.prefill}:
            state = self.fleet.get(worker)
            if state is not None:
                state.release(attempt.id)

    def epoch_of(self, worker: WorkerId) -> int | None:
        """None while it cannot be talked to."""
        state = self.fleet.up(worker)
        return None if state is None else state.info.epoch

    def count_end(self, now: float) -> None:
        """How often a place becomes free. The gaps are averaged: the mean of their inverses says too much."""
        if self.last_end is not None:
            self._gap_s += 0.05 * (now - self.last_end - self._gap_s)
        self.last_end = now

    @property
    def ended_per_s(self) -> float:
        """Requests that left their workers, per second of late."""
        return 1 / max(self._gap_s, 1e-4)

    def queue_wait_s(self, model: str, priority: int) -> float:
        """Predicted time until those who wait for a decode worker, and go first, have found one."""
        queue = self.waiting.get(model)
        return 0.0 if queue is None else queue.num_ahead(priority) / self.ended_per_s
