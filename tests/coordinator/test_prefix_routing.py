"""Where the beginning of a prompt is cached, and how fast its KV travels, counts in where it goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator.decisions import Candidate, Choice
from coordinator.events import FromWorker
from coordinator.fleet import Fleet, WorkerState
from coordinator.links import Links
from coordinator.policies import Policy
from coordinator.router import Router
from coordinator.routes import exposed_s
from coordinator.tier_hits import tier_worth
from pdserve.core.config import LocalPrefill, RoutingPolicy
from pdserve.core.errors import ConfigError
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import Heartbeat, Role, SendPrefixes
from pdserve.core.prefix import PrefixHashes, pack_keys
from pdserve.core.worker_state import BlockCounts, PrefixEvents, TierCounts
from tests.support.model_workers import LAYOUT, worker_info
from tests.support.paths import REPO
from tests.support.registry_world import MODEL, World, new_request

P0, P1, D0, D1 = (WorkerId(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"))
PROMPT = list(range(1, 42))


def attempt(name: str) -> AttemptId:
    return AttemptId(RequestId(name), 0)


def fleet_of(prefill: int, decode: int) -> Fleet:
    fleet = Fleet()
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for index in range(count):
            info = worker_info(f"{role.value}-{index}", role, num_blocks=4096)
            fleet.add(WorkerState(info=info, model=MODEL))
    return fleet


def state(fleet: Fleet, name: WorkerId) -> WorkerState:
    found = fleet.get(name)
    assert found is not None
    return found


def told(worker: WorkerId, sequence: int, tokens: list[int], *, snapshot: bool = False) -> PrefixEvents:
    hashes = PrefixHashes(b"salt", LAYOUT.block_tokens).of(tokens)
    return PrefixEvents(
        worker=worker,
        epoch=1,
        sequence=sequence,
        stored=pack_keys(hashes),
        evicted=b"",
        snapshot=snapshot,
    )


def world_of(policy: RoutingPolicy) -> World:
    world = World(policy=policy)
    for name, role in ((P0, Role.PREFILL), (P1, Role.PREFILL), (D0, Role.DECODE), (D1, Role.DECODE)):
        world.join(name, role)
    return world


@pytest.mark.parametrize("policy", [RoutingPolicy.SLA, RoutingPolicy.PREFIX_AWARE])
def test_a_prompt_goes_where_its_beginning_is_cached(policy: RoutingPolicy) -> None:
    world = world_of(policy)
    for worker in (P1, D1):
        world.up[worker].append(told(worker, 0, PROMPT, snapshot=True))
    world.flush()
    world.submit(new_request("r", prompt=PROMPT))
    world.run()
    report = world.ends[RequestId("r")].report
    assert (report.prefill_worker, report.decode_worker) in ((P1, D1), ("", D1))
    candidates = next(iter(world.registry.decisions.of(RequestId("r")))).placement.decode.candidates
    assert {c.worker: c.prefix_tokens for c in candidates} == {D0: 0, D1: 40}


def below(world: World, worker: WorkerId, bytes_per_s: float) -> None:
    """The prompt lies in a worker's tier."""
    hashes = PrefixHashes(b"salt", LAYOUT.block_tokens).of(PROMPT)
    events = PrefixEvents(
        worker=worker,
        epoch=1,
        sequence=0,
        stored=b"",
        evicted=b"",
        snapshot=True,
        tier_stored=pack_keys(hashes),
    )
    world.handle(FromWorker(worker=worker, epoch=1, message=events))
    told_of = state(world.registry.fleet, worker)
    blocks = BlockCounts(total=4096, free=4096, held=0, cached=0, quarantined=0)
    told_of.heard(
        Heartbeat(
            worker=worker,
            epoch=1,
            blocks=blocks,
            waiting=0,
            running=0,
            waiting_tokens=0,
            step_s=0.01,
            tokens_per_s=0.0,
            prefix_hit_tokens=0,
            prefix_query_tokens=0,
            steps=0,
            tiers=TierCounts(load_bytes_per_s=bytes_per_s),
        )
    )


def prefixes_of(world: World) -> dict[WorkerId, int]:
    """What the prefill candidates of the next request are thought to have."""
    world.submit(new_request("r", prompt=PROMPT))
    (decision,) = world.registry.decisions.of(RequestId("r"))
    assert decision.placement.prefill is not None
    return {c.worker: c.prefix_tokens for c in decision.placement.prefill.candidates}


def test_a_prompt_goes_where_a_tier_has_it_but_rather_where_it_is_cached() -> None:
    world = World(policy=RoutingPolicy.PREFIX_AWARE)
    for name, role in ((P0, Role.PREFILL), (P1, Role.PREFILL), (D0, Role.DECODE)):
        world.join(name, role)
    below(world, P1, 1e9)
    world.submit(new_request("a", prompt=PROMPT))
    (decision,) = world.registry.decisions.of(RequestId("a"))
    assert decision.placement.prefill is not None
    assert decision.placement.prefill.worker == P1
    world.handle(FromWorker(worker=P0, epoch=1, message=told(P0, 0, PROMPT, snapshot=True)))
    found = prefixes_of(world)
    assert 0 < found[P1] < found[P0] == 40


def test_what_a_tier_brings_back_more_slowly_than_it_is_computed_counts_for_nothing() -> None:
    worker = state(fleet_of(1, 1), P0)
    assert tier_worth(worker, 0, 1000) == 0
    world = world_of(RoutingPolicy.SLA)
    below(world, P0, 1e6)
    worker = state(world.registry.fleet, P0)
    assert tier_worth(worker, 0, 1000) == 900
    load_s = 1000 * worker.kv_token_bytes / 1e6
    for tokens in range(100, 1100, 100):
        worker.latency.prefill.learn((1, tokens, tokens * tokens / 2), 2 * load_s * tokens / 1000)
    assert 450 <= tier_worth(worker, 0, 1000) <= 550
    below(world, P0, 4e5)
    assert tier_worth(worker, 0, 1000) == 0


def test_the_tiers_of_a_decode_worker_count_only_where_it_reads_prompts() -> None:
    for num_prefill, counts in ((1, False), (0, True)):
        world = World(policy=RoutingPolicy.SLA)
        for index in range(num_prefill):
            world.join(WorkerId(f"prefill-{index}"), Role.PREFILL)
        world.join(D0, Role.DECODE)
        world.join(D1, Role.DECODE)
        below(world, D1, 1e9)
        world.submit(new_request("r", prompt=PROMPT))
        (decision,) = world.registry.decisions.of(RequestId("r"))
        found = {c.worker: c.prefix_tokens for c in decision.placement.decode.candidates}
        assert (found[D1] > 0) is counts


def test_who_missed_events_is_asked_for_all_of_them_and_not_relied_on_until_then() -> None:
    world = world_of(RoutingPolicy.PREFIX_AWARE)
    world.up[D1] += [told(D1, 0, PROMPT, snapshot=True), told(D1, 2, PROMPT)]
    while world.up[D1]:
        world.deliver_up(D1)
    asked = [send.message for send in world.sent if isinstance(send.message, SendPrefixes)]
    assert asked == [SendPrefixes(after=2)]
    world.submit(new_request("r", prompt=PROMPT))
    (decision,) = world.registry.decisions.of(RequestId("r"))
    assert all(c.prefix_tokens == 0 for c in decision.placement.decode.candidates)


def test_a_busy_holder_of_the_prefix_is_passed_over() -> None:
    fleet = fleet_of(2, 1)
    router = Router(RoutingPolicy.PREFIX_AWARE, 0, LocalPrefill.NEVER)
    for queued, expected in ((0, P1), (4000, P0)):
        state(fleet, P1).place_prefill(attempt(f"q{queued}"), queued or 1)
        placement = router.place(fleet, MODEL, 400, cached={P1: 380})
        assert placement is not None
        assert placement.prefill is not None
        assert placement.prefill.worker == expected


def test_in_a_large_fleet_the_holder_of_the_prefix_is_looked_at_though_it_was_not_drawn() -> None:
    fleet, router = fleet_of(0, 300), Router(RoutingPolicy.SLA, 0)
    holder = WorkerId("decode-157")
    for _ in range(20):
        placement = router.place(fleet, MODEL, 400, cached={holder: 380})
        assert placement is not None
        assert placement.decode.worker == holder


def test_the_faster_pair_is_taken_where_all_else_is_equal() -> None:
    fleet, router = fleet_of(2, 1), Router(RoutingPolicy.SLA, 0, LocalPrefill.NEVER)
    for _ in range(10):
        fleet.links.moved(P0, D0, 10**6, 0.1)
        fleet.links.moved(P0, D1, 10**8, 0.1)
        fleet.links.moved(P1, D0, 10**8, 0.1)
    placement = router.place(fleet, MODEL, 400)
    assert placement is not None
    assert placement.prefill is not None
    assert placement.prefill.worker == P1
    slow, fast = placement.prefill.candidates
    assert slow.transfer_s > 10 * fast.transfer_s


def test_what_is_under_way_delays_what_comes_next() -> None:
    links, prefill = Links(), state(fleet_of(1, 1), P0)
    links.moved(P0, D0, 10**6, 0.01)
    before = exposed_s(links, prefill, D0, 4096)
    links.begun(P0, attempt("a"), 10**7)
    assert exposed_s(links, prefill, D0, 4096) == pytest.approx(before + 0.1)
    links.ended(P0, attempt("a"))
    assert exposed_s(links, prefill, D0, 4096) == before
    assert exposed_s(links, prefill, D0, 0) == 0.0


def test_nothing_stays_under_way_when_requests_have_ended() -> None:
    world = world_of(RoutingPolicy.SLA)
    for index in range(6):
        world.submit(new_request(f"r{index}", prompt=PROMPT))
    world.cancel("r2")
    world.run()
    links = world.registry.fleet.links
    assert [links.bytes_under_way(worker) for worker in (P0, P1)] == [0, 0]
    assert links.bytes_per_s(P0, D0) is not None


class LastByName(Policy):
    """A policy of one's own, as `coordinator.policy: module:Class` names it."""

    def choose(self, candidates: list[Candidate]) -> Choice:  # type: ignore[override]
        last = max(candidates, key=lambda c: c.worker)
        return Choice(last.worker, tuple(candidates), "the last by name")


def test_a_policy_of_ones_own_is_taken_by_its_name() -> None:
    router = Router(f"{__name__}:LastByName", 0)
    placement = router.place(fleet_of(2, 3), MODEL, 10)
    assert placement is not None
    assert placement.decode.worker == "decode-2"
    assert placement.decode.reason == "the last by name"


def test_the_policy_in_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPO / "docs" / "routing.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_policies.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    router, fleet = Router("my_policies:Cautious", 0, LocalPrefill.NEVER), fleet_of(2, 1)
    state(fleet, P1).place_prefill(attempt("q"), 600)
    for cached, expected in ((500, P0), (600, P1)):
        placement = router.place(fleet, MODEL, 1000, cached={P1: cached})
        assert placement is not None
        assert placement.prefill is not None
        assert (placement.prefill.worker, placement.prefill.reason) == (expected, "cautious")


@pytest.mark.parametrize(
    "name", ["fastest", "no.such.module:Policy", "json:JSONDecoder", f"{__name__}:NoSuch"]
)
def test_a_policy_that_is_none_is_refused_with_what_was_wrong(name: str) -> None:
    with pytest.raises(ConfigError, match=r"coordinator\.policy"):
        Router(name, 0)
