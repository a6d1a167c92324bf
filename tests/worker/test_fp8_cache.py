"""An FP8 KV cache on a CPU: close to the plain one, half of the bytes, and never joined with another kind."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from pdserve.core.config import CacheSettings, DType, KVCacheDType, ModelSettings
from pdserve.core.errors import FingerprintMismatch
from pdserve.core.messages import Role, TransferDone
from pdserve.core.sampling import SamplingParams
from pdserve.engine.build import Engine, build_engine
from pdserve.models.ops import SliceMeta
from tests.support.driver import Driver
from tests.support.stepping import BlockDealer
from tests.support.tiny_models import VOCAB, TinyModel, make_tiny_model
from tests.support.workers import Pair, pair_of_workers

BLOCK = 8
PARAMS = SamplingParams(temperature=0.0, seed=1, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model("llama32_tied_llama3_rope", tmp_path_factory.mktemp("tiny"))


def engine_of(tiny: TinyModel, kind: KVCacheDType, dtype: DType = DType.BFLOAT16) -> Engine:
    return build_engine(
        tiny.path,
        ModelSettings(dtype=dtype),
        CacheSettings(block_size=BLOCK, num_blocks=64, kv_cache_dtype=kind),
        device="cpu",
        num_threads=1,
    )


def prompt_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 40])
def test_attention_stays_near_that_of_a_plain_cache(tiny: TinyModel, length: int) -> None:
    found = []
    for kind in (KVCacheDType.AUTO, KVCacheDType.FP8_E4M3):
        engine = engine_of(tiny, kind, DType.FLOAT32)
        ops, config = engine.runner._model.ops, engine.config
        draw = torch.Generator().manual_seed(3)
        shape = (config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        blocks = BlockDealer(engine).sequence(prompt_of(41)).blocks
        for start, count in ((0, 41 - length), (41 - length, length)):
            if count:
                plan = ops.plan([SliceMeta(offset=0, length=count, start=start, blocks=blocks)])
                qkv = torch.randn(count, *shape, generator=draw)
                out = ops.attention(ops.rope_and_write(qkv, 1, plan, None), 1, plan)
        found.append(out.clone())
    plain, fp8 = found
    # A number is off by up to 2^-4 of itself, and by 2^-5.3 in the mean square. Values bring that much into
    # an output; keys as much again through the scores, which are of order one.
    error = (fp8 - plain).pow(2).mean().sqrt() / plain.pow(2).mean().sqrt()
    assert 0.0 < float(error) < 2.0**-4


def test_numbers_beyond_the_format_are_cut_not_lost(tiny: TinyModel) -> None:
    engine = engine_of(tiny, KVCacheDType.FP8_E4M3, DType.FLOAT32)
    ops, pool = engine.runner._model.ops, engine.runner.pools[0].tensor
    config = engine.config
    shape = (1, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
    sequence = BlockDealer(engine).sequence([5])
    plan = ops.plan([SliceMeta(offset=0, length=1, start=0, blocks=sequence.blocks)])
    ops.rope_and_write(torch.full(shape, 1e9), 0, plan, None)
    written = pool[sequence.blocks[0], 0].view(torch.uint8)[:, :, 0].view(torch.float8_e4m3fn).float()
    assert torch.equal(written, torch.full_like(written, 448.0))


def test_a_pair_with_an_fp8_cache_serves_and_moves_half_of_the_bytes(tiny: TinyModel, tmp_path: Path) -> None:
    prompts = [prompt_of(n) for n in (1, BLOCK, 5 * BLOCK + 3)]

    async def scenario(pair: Pair, moved: list[int]) -> None:
        async with Driver(pair.addresses) as driver:
            for prompt in prompts:
                answer = await driver.ask(driver.spec(prompt, PARAMS))
                assert answer.failed is None
                # As one worker would with the same cache: the KV came over as it was written.
                assert answer.tokens == await driver.generate(prompt, PARAMS, colocated=True)
                moved.append(answer.said(TransferDone)[0].bytes_moved)
            layout = driver.infos[driver.the(Role.DECODE)].fingerprint.layouts[0]
            assert moved[-1] == 6 * layout.block_bytes

    moved: dict[KVCacheDType, list[int]] = {}
    for kind in KVCacheDType:
        moved[kind] = []
        folder = tmp_path / kind.value
        folder.mkdir()
        with pair_of_workers(folder, lambda role, kind=kind: engine_of(tiny, kind)) as pair:  # type: ignore[misc]
            asyncio.run(scenario(pair, moved[kind]))
            pair.wait_until_every_block_is_back()
    assert [2 * count for count in moved[KVCacheDType.FP8_E4M3]] == moved[KVCacheDType.AUTO]


def test_peers_with_caches_of_different_kinds_refuse_each_other(tiny: TinyModel) -> None:
    plain, fp8 = (engine_of(tiny, kind).fingerprint for kind in KVCacheDType)
    assert plain.model == fp8.model
    with pytest.raises(FingerprintMismatch, match=r"attention\.dtype='float8_e4m3fn'"):
        plain.require_same(fp8, peer="prefill-0")
