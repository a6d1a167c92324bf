"""The real runner and sampler on a tiny random checkpoint, disaggregated, against transformers."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvtransfer.factory import make_backend
from kvtransfer.protocol import PoolRegion, TransferBackend
from pdserve.core.config import CacheSettings, DType, ModelSettings
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.messages import Role, TransferDone
from pdserve.core.sampling import SamplingParams
from pdserve.core.transfer_settings import TransferBackendName
from pdserve.engine.build import Engine, build_engine
from pdserve.worker.ports import BackendFactory
from tests.support.driver import Driver
from tests.support.tiny_models import VOCAB, TinyModel, make_tiny_model
from tests.support.workers import Pair, pair_of_workers

BLOCK = 8
PARAMS = SamplingParams(temperature=0.0, seed=1, max_tokens=10, ignore_eos=True)
SAMPLED = dataclasses.replace(PARAMS, temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1)


@pytest.fixture(scope="module", params=["llama32_tied_llama3_rope", "mistral_sliding_window"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(request.param, tmp_path_factory.mktemp("tiny"))


def engine_of(tiny: TinyModel) -> Engine:
    return build_engine(
        tiny.path,
        ModelSettings(dtype=DType.FLOAT32),
        CacheSettings(block_size=BLOCK, num_blocks=64),
        device="cpu",
        num_threads=1,
    )


def nixl_backend() -> BackendFactory:
    def make(
        worker: WorkerId, epoch: int, regions: Sequence[PoolRegion], fingerprint: Fingerprint
    ) -> TransferBackend:
        return make_backend(TransferBackendName.NIXL, worker, epoch, regions, fingerprint)

    return make


def greedy_by_transformers(tiny: TinyModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(tiny.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("backend", ["local", "nixl"])
def test_disaggregated_tokens_equal_those_of_transformers_and_of_one_worker(
    tiny: TinyModel, tmp_path: Path, backend: str
) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (1, BLOCK - 1, BLOCK, 5 * BLOCK + 3)]

    async def scenario(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            answers = await asyncio.gather(*[driver.ask(driver.spec(p, PARAMS)) for p in prompts])
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.failed is None
                assert answer.tokens == greedy_by_transformers(tiny, prompt, 10)
            sampled = await asyncio.gather(*[driver.generate(p, SAMPLED) for p in prompts])
            together = await asyncio.gather(*[driver.generate(p, SAMPLED, colocated=True) for p in prompts])
            assert sampled == together
            moved = answers[-1].said(TransferDone)[0]
            layout = driver.infos[driver.the(Role.DECODE)].fingerprint.layouts[0]
            assert moved.bytes_moved == 6 * layout.block_bytes
            assert moved.path == ("local" if backend == "local" else "shm")

    backends = nixl_backend() if backend == "nixl" else None
    with pair_of_workers(tmp_path, lambda role: engine_of(tiny), backends=backends) as pair:
        asyncio.run(scenario(pair))
        pair.wait_until_every_block_is_back()
