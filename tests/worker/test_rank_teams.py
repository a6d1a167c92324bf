"""Workers of several ranks: the tokens of one rank, between workers of any number of them."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from kvtransfer.local import LocalHub
from kvtransfer.protocol import NoteArrived, Outcome, PushEnded, TransferEvent, TransferStopped
from pdserve.core.errors import ConfigError, TransferError, WorkerLost
from pdserve.core.messages import KvArrived, PrefillStarted, Role
from pdserve.core.sampling import SamplingParams
from pdserve.worker.ranks.joining import NoteJoin, PushJoin
from pdserve.worker.ranks.leader import Leader
from pdserve.worker.ranks.meeting import join_leader, make_ranks
from pdserve.worker.ranks.names import RankSpec, make_meeting
from pdserve.worker.ranks.wire import RankReady, StopRank
from tests.support.driver import Driver
from tests.support.teams import BLOCK, pair_of_teams, start_team
from tests.support.tiny_models import VOCAB, TinyModel, make_tiny_model_of
from tests.support.workers import DECODE, PREFILL, Pair, local_backends
from tests.worker.test_prefix_moves import Mover

PARAMS = SamplingParams(temperature=0.0, seed=1, max_tokens=9, ignore_eos=True)
SAMPLED = replace(PARAMS, temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return make_tiny_model_of(config, tmp_path_factory.mktemp("tiny"))


def greedy_by_transformers(tiny: TinyModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(tiny.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_tokens_are_the_same_whatever_the_number_of_ranks_on_either_side(
    prefill: int, decode: int, tiny: TinyModel, tmp_path: Path
) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (1, BLOCK, 5 * BLOCK + 3)]

    async def scenario(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            answers = await asyncio.gather(*[driver.ask(driver.spec(p, PARAMS)) for p in prompts])
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.failed is None
                assert answer.tokens == greedy_by_transformers(tiny, prompt, PARAMS.max_tokens)
            sampled = await asyncio.gather(*[driver.generate(p, SAMPLED) for p in prompts])
            together = await asyncio.gather(*[driver.generate(p, SAMPLED, colocated=True) for p in prompts])
            assert sampled == together

    with pair_of_teams(tmp_path, tiny.path, prefill, decode) as (pair, *teams):
        assert all(team.worker.info.profile for team in teams), "measured with all ranks"
        asyncio.run(scenario(pair))
        pair.wait_until_every_block_is_back()


def test_a_prefix_moves_with_the_heads_of_all_ranks(tiny: TinyModel, tmp_path: Path) -> None:
    prompt = random.Random(8).choices(range(3, VOCAB), k=5 * BLOCK + 3)

    async def scenario(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            wanted = greedy_by_transformers(tiny, prompt, PARAMS.max_tokens)
            assert await driver.generate(prompt, PARAMS, colocated=True) == wanted
            _, arrived = await Mover(driver).move(prompt, DECODE, PREFILL)
            assert isinstance(arrived, KvArrived)
            answer = await driver.ask(driver.spec(prompt, PARAMS))
            assert answer.tokens == wanted
            (started,) = answer.said(PrefillStarted)
            assert started.cached_tokens == 5 * BLOCK

    with pair_of_teams(tmp_path, tiny.path, 2, 2) as (pair, *_):
        asyncio.run(scenario(pair))
        pair.wait_until_every_block_is_back()


def test_a_worker_ends_when_one_of_its_ranks_does(tiny: TinyModel, tmp_path: Path) -> None:
    team = start_team(Role.DECODE, 2, tmp_path, tiny.path, local_backends(LocalHub()))
    team.followers[0].close()
    with pytest.raises(TransferError, match="rank 1 is gone: its process ended"):
        team.worker.wait()
    team.stop()
    assert isinstance(team.ends[0], WorkerLost)


def test_a_rank_ends_when_its_leader_does(tiny: TinyModel, tmp_path: Path) -> None:
    team = start_team(Role.PREFILL, 2, tmp_path, tiny.path, local_backends(LocalHub()))
    team.worker.stop()
    team.threads[0].join(30.0)
    assert not team.threads[0].is_alive()
    assert team.ends == [None]


def test_a_rank_that_says_nothing_is_dead(tmp_path: Path) -> None:
    place = RankSpec(rank=0, size=2, meeting=tmp_path / "ranks")
    told, heard = threading.Event(), []
    over = threading.Event()

    def silent() -> None:
        link, store = join_leader(PREFILL, replace(place, rank=1), 1, 30.0)
        make_ranks(PREFILL, replace(place, rank=1), store, "cpu")
        link.send(RankReady(b"here"))
        over.wait(30.0)
        link.close()

    thread = threading.Thread(target=silent)
    thread.start()
    leader = Leader(PREFILL, place, device="cpu", start_timeout_s=30.0, silence_s=0.1)

    def on_event(rank: int, event: TransferEvent) -> None:
        heard.append(event)
        told.set()

    leader.listen(on_event)
    assert leader.metadata() == [b"here"]
    assert told.wait(10.0)
    assert heard == [TransferStopped(error="rank 1 is gone: silent for 0.1 s")]
    with pytest.raises(WorkerLost, match="rank 1 is gone"):
        leader.tell(StopRank())
    over.set()
    thread.join()


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    place = RankSpec(rank=0, size=3, meeting=tmp_path / "ranks")
    with pytest.raises(WorkerLost, match=r"ranks \[1, 2\] did not come"):
        Leader(PREFILL, place, device="cpu", start_timeout_s=0.05, silence_s=1.0)
    with pytest.raises(WorkerLost, match="rank 1 does not find rank 0"):
        join_leader(PREFILL, replace(place, rank=1, meeting=tmp_path / "nobody"), 1, 0.05)


def test_a_meeting_place_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="not private"):
        make_meeting(RankSpec(rank=0, size=2, meeting=tmp_path / "open"))


def test_parts_of_a_push_end_as_one() -> None:
    joined = PushJoin(7, 3)
    assert joined.add(PushEnded(id=1, outcome=Outcome.COMPLETED, bytes_moved=5, seconds=0.5)) is None
    late = joined.add(PushEnded(id=2, outcome=Outcome.TIMED_OUT, error="late"))
    assert late == PushEnded(id=7, outcome=Outcome.TIMED_OUT, error="late")
    assert joined.add(PushEnded(id=3, outcome=Outcome.TIMED_OUT, error="late too")) is None
    assert joined.add(PushEnded(id=2, outcome=Outcome.FAILED, error="gone")) is None
    whole = joined.add(PushEnded(id=3, outcome=Outcome.COMPLETED, bytes_moved=5, seconds=0.7))
    assert whole == PushEnded(id=7, outcome=Outcome.FAILED, seconds=0.7, error="gone")


def test_a_note_is_told_once_all_ranks_have_brought_it() -> None:
    notes = NoteJoin()
    part = NoteArrived(peer=PREFILL, note=b"one")
    assert notes.add(0, 2, part) is None
    assert notes.add(0, 2, part) is None  # again from the same rank
    assert notes.add(1, 2, replace(part, note=b"two")) is None
    whole = notes.add(1, 2, replace(part, error="other bytes"))
    assert whole == NoteArrived(peer=PREFILL, note=b"one", error="other bytes")
    assert len(notes) == 1
    notes.drop(PREFILL)
    assert len(notes) == 0


def test_parts_of_notes_that_never_become_whole_are_forgotten() -> None:
    now = 0.0
    notes = NoteJoin(lambda: now)
    notes.add(0, 2, NoteArrived(peer=PREFILL, note=b"one"))
    now = 3600.0
    notes.add(0, 2, NoteArrived(peer=PREFILL, note=b"two"))
    assert len(notes) == 1
