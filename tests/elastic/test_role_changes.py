"""A worker in either role, or between them: what it takes, what it refuses, what goes on."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path

import pytest

from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout
from pdserve.core.messages import (
    AttemptFailed,
    ChangeRole,
    ConnectPeer,
    Hello,
    Message,
    PrefillDone,
    PushesSettled,
    RefusalReason,
    Refused,
    RequestSpec,
    Reserved,
    Role,
    RoleChanged,
    StartDecode,
    StartPrefill,
    Tokens,
)
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import Sampled
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import Action, FromCoordinator, OwnerId, Send
from tests.support.driver import Driver
from tests.support.schedulers import make_scheduler
from tests.support.token_engine import VOCAB, TokenEngine, reference
from tests.support.workers import DECODE, PREFILL, Pair, config_of, pair_of_workers

BLOCK = 4
LAYOUT = GroupLayout(
    group=CacheGroup(name="kv", num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32"), block_tokens=BLOCK
)
OWNER, PEER = OwnerId(1), WorkerId("peer")
FINGERPRINT = Fingerprint(protocol=PROTOCOL_VERSION, model="m", layouts=(LAYOUT,))


class Bench:
    def __init__(self, role: Role, *, budget: int = 8) -> None:
        self.scheduler = make_scheduler(role, layout=LAYOUT, budget=budget)
        self.sent: list[Message] = []
        self.tell(Hello(protocol=PROTOCOL_VERSION, sender="test"))
        self.tell(ConnectPeer(peer=PEER, epoch=1, fingerprint=FINGERPRINT, metadata=b""))

    def do(self, actions: list[Action]) -> None:
        self.sent += [action.message for action in actions if isinstance(action, Send)]
        self.scheduler.audit()

    def tell(self, message: Message) -> None:
        self.do(self.scheduler.handle(FromCoordinator(OWNER, message), 0.0))
        self.do(self.scheduler.sweep(0.0))

    def write(self, name: str, num_tokens: int, *, remote: bool, max_tokens: int = 3) -> AttemptId:
        spec = spec_of(name, num_tokens, max_tokens)
        self.tell(StartDecode(spec=spec, prefill_worker=PEER if remote else None, lease_s=10.0))
        return spec.attempt

    def read(self, name: str, num_tokens: int) -> AttemptId:
        spec = spec_of(name, num_tokens, 8)
        blocks = [7 + i for i in range(-(-num_tokens // BLOCK))]
        self.tell(
            StartPrefill(
                spec=spec,
                decode_worker=PEER,
                decode_epoch=1,
                dst_blocks=blocks,  # type: ignore[arg-type]
                dst_cached_tokens=0,
                transfer_deadline_s=5.0,
            )
        )
        return spec.attempt

    def step(self) -> list[tuple[str, int, int]]:
        plan, actions = self.scheduler.schedule(1.0)
        self.do(actions)
        if plan is None:
            return []
        parts = [*plan.turns, *plan.chunks]
        for first in range(2):
            self.do(list(self.scheduler.layers_done(plan, first, first + 1, 1.0)))
        told = [(str(part.run.attempt.request), part.start, part.end) for part in parts]
        results = [WorkResult(Sampled(9, None) if part.final else None, []) for part in parts]
        self.do(self.scheduler.complete(plan, results, 1.0))
        self.do(self.scheduler.sweep(1.0))
        return told

    def said(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.sent if isinstance(message, kind)]


def spec_of(name: str, num_tokens: int, max_tokens: int) -> RequestSpec:
    tokens = random.Random(name).choices(range(1000), k=num_tokens)
    return RequestSpec(
        attempt=AttemptId(RequestId(name), 0),
        tokens=tokens,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        eos_token_ids=(),
        cache_salt=b"",
        arrival=0.0,
    )


def test_a_prefill_worker_keeps_a_request_whole_when_told_and_refuses_to_receive_one() -> None:
    bench = Bench(Role.PREFILL)
    bench.write("whole", 6, remote=False)
    bench.write("remote", 6, remote=True)
    (refused,) = bench.said(Refused)
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.WRONG_ROLE
    assert [bench.step(), bench.step(), bench.step()] == [
        [("whole", 0, 6)],
        [("whole", 6, 7)],
        [("whole", 7, 8)],
    ]
    assert bench.scheduler.idle


def test_prompts_for_others_share_the_steps_of_answers_within_the_budget() -> None:
    bench = Bench(Role.PREFILL, budget=9)
    bench.write("whole", 4, remote=False, max_tokens=9)
    bench.step()
    bench.read("other", 30)
    assert bench.step() == [("whole", 4, 5), ("other", 0, 8)]
    assert bench.step() == [("whole", 5, 6), ("other", 8, 16)]
    assert bench.scheduler.heartbeat().running == 2


def test_a_decode_worker_refuses_a_prompt_for_others_as_retryable_and_settles_it() -> None:
    bench = Bench(Role.DECODE)
    attempt = bench.read("r", 6)
    (failed,) = bench.said(AttemptFailed)
    assert isinstance(failed, AttemptFailed)
    assert (failed.attempt, failed.retryable) == (attempt, True)
    assert bench.said(PushesSettled) == [PushesSettled(attempt=attempt)]


def test_the_role_that_it_has_is_confirmed_at_once() -> None:
    bench = Bench(Role.DECODE)
    bench.tell(ChangeRole(role=Role.DECODE))
    assert bench.said(RoleChanged) == [RoleChanged(worker=WorkerId("decode-0"), epoch=1, role=Role.DECODE)]


def test_a_role_change_takes_new_work_at_once_and_is_over_when_the_old_is_gone() -> None:
    bench = Bench(Role.DECODE)
    bench.write("old", 3, remote=False, max_tokens=4)
    bench.step()
    bench.tell(ChangeRole(role=Role.PREFILL))
    assert bench.scheduler.heartbeat().role is Role.PREFILL
    bench.write("late", 3, remote=True)
    assert len(bench.said(Refused)) == 1
    bench.read("new", 4)
    assert bench.step() == [("old", 3, 4), ("new", 0, 4)]
    assert len(bench.said(PrefillDone)) == 2
    assert bench.said(RoleChanged) == []
    bench.step()
    bench.step()
    changed = RoleChanged(worker=WorkerId("decode-0"), epoch=1, role=Role.PREFILL)
    assert bench.said(RoleChanged) == [changed]
    bench.step()
    assert bench.said(RoleChanged) == [changed]


def test_a_later_change_of_role_supersedes_an_earlier_one() -> None:
    bench = Bench(Role.DECODE)
    bench.write("old", 3, remote=False, max_tokens=4)
    bench.tell(ChangeRole(role=Role.PREFILL))
    bench.tell(ChangeRole(role=Role.DECODE))
    bench.write("next", 3, remote=True)
    assert len(bench.said(Reserved)) == 2
    assert [message.role for message in bench.said(RoleChanged)] == [Role.DECODE]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 30}], ids=["greedy", "sampled"]
)
def test_two_workers_swap_their_roles_and_the_tokens_stay_the_same(
    tmp_path: Path, params: dict[str, float]
) -> None:
    sampling = SamplingParams(seed=3, max_tokens=20, ignore_eos=True, **params)  # type: ignore[arg-type]
    prompts = [random.Random(i).choices(range(VOCAB), k=5 + 9 * i) for i in range(4)]

    async def play(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            for _ in range(3):
                answers = await asyncio.gather(*[driver.ask(driver.spec(p, sampling)) for p in prompts])
                for prompt, answer in zip(prompts, answers, strict=True):
                    assert answer.tokens == reference(prompt, sampling, 20)
                    assert len(answer.said(Tokens)) == 20
                for worker in (PREFILL, DECODE):
                    info = driver.infos[worker]
                    other = Role.DECODE if info.role is Role.PREFILL else Role.PREFILL
                    count = len(driver.strays)
                    driver.send(worker, ChangeRole(role=other))
                    await driver.until(lambda count=count: len(driver.strays) > count)  # type: ignore[misc]
                    assert driver.strays[-1] == RoleChanged(worker=worker, epoch=1, role=other)
                    driver.infos[worker] = dataclasses.replace(info, role=other)

    with pair_of_workers(tmp_path, lambda role: TokenEngine(), config_of()) as pair:
        asyncio.run(play(pair))
        pair.wait_until_every_block_is_back()
        # Both have kept their prefix caches: what they computed or received in one role serves the other.
        assert pair.prefill.snapshot().prefix_hit_tokens > 0
        assert pair.decode.snapshot().prefix_hit_tokens > 0


@pytest.mark.parametrize("mode", ["active", "advisory"])
def test_a_prefill_worker_that_the_planner_makes_a_decode_worker_guesses_like_one(
    tmp_path: Path, mode: str
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    prompt = random.Random(0).choices(range(VOCAB), k=20)
    config = config_of(
        planner={"mode": mode},
        speculative={"method": "draft_model", "model": "draft", "adaptive": False},
    )

    async def play(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            driver.send(PREFILL, ChangeRole(role=Role.DECODE))
            await driver.until(lambda: len(driver.strays) > 0)
            driver.send(DECODE, ChangeRole(role=Role.PREFILL))
            await driver.until(lambda: len(driver.strays) > 1)
            for worker, role in ((PREFILL, Role.DECODE), (DECODE, Role.PREFILL)):
                driver.infos[worker] = dataclasses.replace(driver.infos[worker], role=role)
            answer = await driver.ask(driver.spec(prompt, sampling))
            assert answer.tokens == reference(prompt, sampling, 30)

    with pair_of_workers(
        tmp_path,
        lambda role: TokenEngine(),
        config,
        draft_engine=TokenEngine(),
        prefill_draft_engine=TokenEngine(),
    ) as pair:
        asyncio.run(play(pair))
        pair.wait_until_every_block_is_back()
        assert (sum(pair.prefill.snapshot().accepted_at) > 20) is (mode == "active")


@pytest.mark.parametrize("seed", range(3))
def test_roles_that_change_under_load_cost_no_token_and_no_block(tmp_path: Path, seed: int) -> None:
    """Requests that meet a worker in the wrong role are refused, or fail as retryable; others are right."""
    rng = random.Random(seed)
    guessing = {"method": "ngram", "adaptive": False, "prompt_lookup_min": 1}

    async def asked(driver: Driver, index: int) -> None:
        sampling = SamplingParams(temperature=0.8, seed=index, max_tokens=12, ignore_eos=True)
        prompt = random.Random(index).choices(range(VOCAB), k=rng.randrange(1, 40))
        for _ in range(200):
            await asyncio.sleep(rng.random() * 0.02)
            spec = dataclasses.replace(driver.spec(prompt, sampling))
            answer = await driver.ask(spec, colocated=index % 3 == 0, retry=False)
            if answer.finish is not None:
                assert answer.tokens == reference(prompt, sampling, 12)
                return
            assert answer.refused is not None or (answer.failed is not None and answer.failed.retryable)
        raise AssertionError("no attempt got through")

    async def flips(driver: Driver) -> None:
        for _ in range(6):
            await asyncio.sleep(0.03)
            # Both at once, so that there is one of each but for the time in between.
            before = len([m for m in driver.strays if isinstance(m, RoleChanged)])
            for worker in (PREFILL, DECODE):
                info = driver.infos[worker]
                other = Role.DECODE if info.role is Role.PREFILL else Role.PREFILL
                driver.send(worker, ChangeRole(role=other))
                driver.infos[worker] = dataclasses.replace(info, role=other)
            await driver.until(
                lambda before=before: (
                    len([m for m in driver.strays if isinstance(m, RoleChanged)]) == before + 2
                )  # type: ignore[misc]
            )

    async def play(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver, asyncio.TaskGroup() as group:
            group.create_task(flips(driver))
            for index in range(24):
                group.create_task(asked(driver, index))

    with pair_of_workers(tmp_path, lambda role: TokenEngine(), config_of(speculative=guessing)) as pair:
        asyncio.run(play(pair))
        pair.wait_until_every_block_is_back()
