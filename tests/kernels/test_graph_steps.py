"""Decode steps from fixed buffers give the logits of eager ones; on a GPU they are CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pdserve.core.ids import BlockId
from pdserve.core.layout import CacheGroup, GroupLayout
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import Sampled, SampleFailed, SampleRequest, SequenceSlice
from pdserve.engine.decode_graphs import Captured, cuda_capture
from pdserve.engine.kv_pool import KVPool
from pdserve.engine.runner import ModelRunner
from pdserve.engine.sampler import Sampler
from pdserve.models.config import ModelConfig, RopeConfig
from pdserve.models.ops import SliceMeta
from pdserve.models.weights import DummySource, load_llama

ops_triton = pytest.importorskip("pdserve.models.ops_triton", exc_type=ImportError)
device_sampler = pytest.importorskip("pdserve.engine.device_sampler", exc_type=ImportError)
build = pytest.importorskip("pdserve.engine.build_gpu", exc_type=ImportError)

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    max_position=64,
    tie_word_embeddings=True,
    dtype="float32",
)
BLOCK_TOKENS = 8
TABLES = [[BlockId(b) for b in blocks] for blocks in ([7, 2, 9], [1, 8, 3], [6, 10, 0])]


def stand_in(step: Callable[[], Tensor]) -> Captured:
    """A recording that computes the step again, into the same memory."""
    out = step()

    def replay() -> None:
        out.copy_(step())

    return Captured(out, replay)


def runner_on(device: str) -> ModelRunner:
    target = torch.device(device)
    ops = ops_triton.TritonOps(CONFIG, target, 64)
    model = load_llama(
        CONFIG,
        DummySource(torch.float32),
        ops,
        dtype=torch.float32,
        device=target,
        progress=lambda *_: None,
    )
    group = CacheGroup(name="attention", num_layers=1, num_kv_heads=2, head_dim=16, dtype="float32")
    pool = KVPool(GroupLayout(group=group, block_tokens=BLOCK_TOKENS), 12, target)
    return ModelRunner(model, (pool,), max_model_len=24, model_digest="", device=target)


def steps(runner: ModelRunner) -> list[Tensor]:
    """Three prompts, then decode steps of changing batches, one of them too large for any graph."""
    found = []
    lengths = [11, 3, 7]
    for seq, length in enumerate(lengths):
        tokens = [(seq * 17 + i) % 61 for i in range(length)]
        found.append(runner.forward([SequenceSlice(tokens=tokens, start=0, blocks=TABLES[seq])]).clone())
    for batch in ([0], [2, 0], [0, 1, 2], [1], [1, 0]):
        slices = []
        for seq in batch:
            token = (lengths[seq] * 5 + seq) % 61
            slices.append(SequenceSlice(tokens=[token], start=lengths[seq], blocks=TABLES[seq]))
            lengths[seq] += 1
        found.append(runner.forward(slices).clone())
    return found


def test_steps_that_take_a_graph_give_the_logits_of_eager_steps(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = steps(runner_on(device))
    runner = runner_on(device)
    taken: list[int] = []
    capture = cuda_capture(torch.device(device)) if device == "cuda" else stand_in
    with torch.inference_mode():
        graphs = build.decode_graphs(runner, (1, 2), capture, lambda *_: None)

    replay = graphs.forward

    def counted(rows: int, tokens: Sequence[int], slices: Sequence[SliceMeta]) -> Tensor:
        taken.append(rows)
        return replay(rows, tokens, slices)

    monkeypatch.setattr(graphs, "forward", counted)
    runner.use_graphs(graphs)
    for found, want in zip(steps(runner), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert taken == [1, 2, 1, 2]


def test_padding_rows_write_nothing_to_the_pool(device: str) -> None:
    runner = runner_on(device)
    runner.pools[0].tensor.fill_(3.0)
    with torch.inference_mode():
        build.decode_graphs(runner, (4,), stand_in, lambda *_: None)
    assert bool((runner.pools[0].tensor == 3.0).all())


def test_a_tied_head_is_the_embedding_itself(device: str) -> None:
    model = runner_on(device).model
    assert model.head.weight_OI.data_ptr() == model.embedding_VE.data_ptr()


def request(row: int, **fields: object) -> SampleRequest:
    params = SamplingParams(seed=row + 5, **fields)  # type: ignore[arg-type]
    return SampleRequest(params=params, tokens=[5, 6, 7, 6, row], num_prompt_tokens=3, eos_token_ids=(2,))


def test_the_device_draws_the_tokens_of_the_cpu(device: str) -> None:
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.7, "logit_bias": {3: 4.0, 6: -2.0}},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.9, "min_p": 0.1, "frequency_penalty": 0.6, "presence_penalty": -0.4},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "min_tokens": 9, "repetition_penalty": 0.8},
    ]
    requests = [request(row, **kind) for row, kind in enumerate(kinds * 2)]
    logits = torch.randn(len(requests), 90) * 3
    logits[4] = float("nan")
    wanted = Sampler(90, "cpu").sample(logits, requests)
    before = logits.clone()
    found = device_sampler.DeviceSampler(90, device).sample(logits.to(device), requests)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert isinstance(found[4], SampleFailed)
    tokens = [[r.token if isinstance(r, Sampled) else None for r in results] for results in (wanted, found)]
    assert tokens[0] == tokens[1]
