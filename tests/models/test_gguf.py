"""GGUF files become Hugging Face directories: weights, tokenizer, configuration; broken files are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.core.errors import CheckpointError, MissingTensor, UnsupportedArchitecture
from pdserve.models import gguf as converter
from pdserve.models.checkpoint import Checkpoint
from pdserve.models.config import RopeKind
from pdserve.models.gguf import convert
from pdserve.models.gguf_metadata import llama3_factors
from pdserve.models.hf_config import read_config
from pdserve.text.tokenizer import ChatMessage, Tokenizer
from tests.support.gguf_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocab,
    byte_vocab,
    write_gguf,
)
from tests.support.paths import shared

SIZES = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 32, "ff": 96, "context": 128}
TEXTS = [
    "",
    "Hello, world! The answer is 1234567.",
    "  two spaces\n\n\ttab and 'quotes' don't I'LL",
    "naïve café Ελληνικά 日本語 emoji 🤗👩‍👩‍👧 and \u00a0 odd \u200b space",
    "def f(x):\n    return x**2  # comment\r\n",
    "١٢٣ Ⅷ ½ 3.14159 1,000,000",
    "x" * 300,
]


def weights(arch: str, *, vocab: int = 264, tied: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, ff = SIZES["hidden"], SIZES["ff"]
    q, kv = SIZES["heads"] * SIZES["head_dim"], SIZES["kv_heads"] * SIZES["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(SIZES["layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (ff, hidden),
            prefix + "mlp.up_proj.weight": (ff, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ff),
        }
        if arch in ("qwen2", "llama"):
            names = {"q_proj": q, "k_proj": kv, "v_proj": kv}
            shapes |= {f"{prefix}self_attn.{name}.bias": (rows,) for name, rows in names.items()}
        if arch == "llama":
            shapes[prefix + "self_attn.o_proj.bias"] = (hidden,)
        if arch == "qwen3":
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (SIZES["head_dim"],) for name in "qk"}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def converted(
    tmp_path: Path, arch: str = "qwen3", *, vocab: Vocab | None = None, **options: object
) -> tuple[Path, dict[str, torch.Tensor]]:
    vocab = vocab or byte_vocab()
    tensors = weights(arch, vocab=len(vocab.tokens), tied=bool(options.pop("tied", False)))
    source = write_gguf(tmp_path / "m.gguf", arch, SIZES, tensors, vocab, **options)  # type: ignore[arg-type]
    return convert(source, tmp_path / "out"), tensors


def assert_same(folder: Path, wanted: Mapping[str, torch.Tensor]) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.names == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(checkpoint.get(name), tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_under_their_names_with_every_head_in_order(
    tmp_path: Path, arch: str, tied: bool
) -> None:
    folder, tensors = converted(tmp_path, arch, tied=tied)
    assert_same(folder, tensors)
    config = read_config(folder)
    assert config.tie_word_embeddings is tied
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert config.qkv_bias is (arch != "qwen3")
    assert config.o_bias is (arch == "llama")
    assert config.qk_norm is (arch == "qwen3")
    assert config.rms_norm_eps == 1e-5
    assert config.max_position == 128
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]


def test_conversion_in_small_pieces_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "_STEP_ELEMENTS", 100)
    folder, tensors = converted(tmp_path, "llama")
    assert_same(folder, tensors)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16"])
def test_quantised_weights_are_what_the_gguf_package_makes_of_them(tmp_path: Path, kind: str) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    folder, tensors = converted(tmp_path, "qwen3", kind=quant)

    def read_back(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:
            return tensor
        return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), quant), quant))

    assert_same(folder, {name: read_back(tensor) for name, tensor in tensors.items()})


def test_progress_goes_up_to_one(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", "qwen3", SIZES, weights("qwen3"), byte_vocab())
    seen: list[float] = []
    convert(source, tmp_path / "out", lambda fraction, words: seen.append(fraction))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)


def test_llama_3_rope_is_recovered_from_its_frequency_factors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    reference = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=scaling)
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(llama3_factors(500000.0, 64, 32.0), (plain / inverse).numpy(), rtol=1e-4)

    # theta of the test files is 10000 and heads have 16 dimensions
    factors = {"rope_freqs.weight": llama3_factors(10000.0, 16, 8.0)}
    folder, _ = converted(tmp_path, "llama", extra_tensors=factors)
    rope = read_config(folder).rope
    assert rope.kind is RopeKind.LLAMA3
    assert rope.factor == pytest.approx(8.0, rel=1e-3)


def test_frequency_factors_of_another_kind_are_refused(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        converted(tmp_path, "llama", extra_tensors=factors)


def test_linear_rope_scaling_is_kept_and_yarn_refused(tmp_path: Path) -> None:
    scaling: dict[str, float | str] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    folder, _ = converted(tmp_path, "llama", metadata=scaling)
    assert (read_config(folder).rope.kind, read_config(folder).rope.factor) == (RopeKind.LINEAR, 4.0)
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type.*yarn"):
        converted(tmp_path, "llama", metadata=scaling | {"llama.rope.scaling.type": "yarn"})


def test_a_byte_level_vocabulary_round_trips_any_text(tmp_path: Path) -> None:
    folder, _ = converted(tmp_path)
    tokenizer = Tokenizer.from_dir(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(" then 12") == [258, 77, 220, 260]  # Ġthe n Ġ 12


def test_special_tokens_template_and_ends_are_carried_over(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    folder, _ = converted(tmp_path, vocab=byte_vocab(add_bos=True, chat_template=template))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.bos_token_id == 261
    assert tokenizer.encode("an") == [261, 259]
    assert tokenizer.encode("an<|end|>", add_special_tokens=False) == [259, 262]
    # <|im_end|> ends a turn although the file names <|end|> alone
    assert tokenizer.eos_token_ids == (262, 263) == read_config(folder).eos_token_ids
    assert (
        tokenizer.apply_chat_template([ChatMessage(role="user", content="hi")]) == "<|begin|>user:hi<|end|>"
    )


def test_smollm_digits_stand_alone_and_llama_3_digits_come_in_threes(tmp_path: Path) -> None:
    # with a merge of "1 2", only a pre-tokenizer that keeps digits together lets it happen
    for pre, wanted in (("smollm", 2), ("qwen2", 2), ("llama-bpe", 1), ("gpt-2", 1)):
        folder = tmp_path / pre
        folder.mkdir()
        out, _ = converted(folder, vocab=byte_vocab(pre=pre, add_bos=False))
        assert len(Tokenizer.from_dir(out).encode("12")) == wanted, pre


def sentencepiece_vocab(**changes: object) -> Vocab:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merged = ["▁h", "el", "lo", "▁hel", "▁hello", "l", "o", "▁", "h", "e", "<tool>"]
    values: dict[str, object] = {
        "tokens": pieces + merged,
        "kinds": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 10 + [USER_DEFINED],
        "scores": [0.0] * 259 + [-float(rank) for rank in range(11)],
        "bos": 1,
        "eos": 2,
    }
    return Vocab(**(values | changes))  # type: ignore[arg-type]  # a test names its own changes


def test_a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    folder, _ = converted(tmp_path, "llama", vocab=sentencepiece_vocab())
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.encode("hello") == [1, 263]
    assert tokenizer.encode("é", add_special_tokens=False) == [266, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.encode("o<tool>o", add_special_tokens=False) == [266, 265, 269, 266, 265]
    assert tokenizer.decode(tokenizer.encode("hello é 🤗 hello")) == "hello é 🤗 hello"


@pytest.mark.parametrize("model", ["stories260K", "stories15M"])
def test_real_sentencepiece_vocabularies_encode_as_their_own_tokenizers(tmp_path: Path, model: str) -> None:
    folder = shared(f"models/{model}")
    tree = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(tree["vocab"], key=tree["vocab"].__getitem__)
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(tree["merges"])))}
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259)
    # Llama 2 gives every run of spaces the same, worst score
    scores = [-1e9 if set(token) == {"▁"} else -float(ranks.get(token, 10**6)) for token in tokens]
    vocab = Vocab(tokens=tokens, kinds=kinds, scores=scores, bos=1, eos=2)
    ours = Tokenizer.from_dir(converted(tmp_path, "llama", vocab=vocab)[0])
    theirs = Tokenizer.from_dir(folder)
    words = [tokens[i].replace("▁", " ") for i in random.Random(0).choices(range(259, len(tokens)), k=3000)]
    for text in [
        *TEXTS,
        *("a" + " " * n + "b" for n in range(40)),
        *("".join(words[i : i + 10]) for i in range(0, 3000, 10)),
    ]:
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.slow
def test_qwen_vocabulary_encodes_as_its_own_tokenizer(tmp_path: Path) -> None:
    folder = shared("tokenizers/qwen3")
    tree = json.loads((folder / "tokenizer.json").read_text())
    by_id = {index: token for token, index in tree["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tree["added_tokens"]}
    by_id |= {index: entry["content"] for index, entry in added.items()}
    tokens = [by_id[index] for index in range(len(by_id))]
    kinds = [
        (CONTROL if added[i]["special"] else USER_DEFINED) if i in added else NORMAL
        for i in range(len(tokens))
    ]
    merges = [" ".join(pair) for pair in tree["model"]["merges"]]
    vocab = Vocab(tokens=tokens, kinds=kinds, merges=merges, pre="qwen2", eos=151645)
    ours = Tokenizer.from_dir(converted(tmp_path, vocab=vocab)[0])
    theirs = Tokenizer.from_dir(folder)
    for text in [*TEXTS, "<|im_start|>user\ne\u0301<think>\n</think><|im_end|>"]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize(
    ("vocab", "words"),
    [
        (byte_vocab(pre="viking"), ["tokenizer.ggml.pre", "viking", "llama-bpe"]),
        (byte_vocab(merges=["t h", "nope"]), ["tokenizer.ggml.merges", "nope"]),
        (byte_vocab(merges=["zz yy"]), ["merges"]),
        (byte_vocab(bos=9999), ["tokenizer.ggml.bos_token_id", "9999"]),
        (byte_vocab(kinds=[1, 2]), ["tokenizer.ggml.token_type"]),
        (byte_vocab(tokens=["a"] * 264), ["tokenizer.ggml.tokens", "different"]),
        (sentencepiece_vocab(scores=[0.0]), ["tokenizer.ggml.scores"]),
    ],
)
def test_a_vocabulary_that_is_not_understood_is_one_error_and_leaves_nothing_behind(
    tmp_path: Path, vocab: Vocab, words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, vocab=vocab)
    for word in ["m.gguf", *words]:
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="gemma"):
        converted(tmp_path, "gemma")


def test_an_unknown_or_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a"):
        converted(tmp_path, extra_tensors={"blk.0.ssm_a": np.ones(4, dtype=np.float32)})
    tensors = weights("qwen3")
    del tensors["model.embed_tokens.weight"]
    source = write_gguf(tmp_path / "n.gguf", "qwen3", SIZES, tensors, byte_vocab())
    with pytest.raises(MissingTensor, match=r"token_embd\.weight"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 8, 24, 200, 5000, -1, -5000])
def test_a_truncated_file_is_one_error(tmp_path: Path, keep: int) -> None:
    source = write_gguf(tmp_path / "m.gguf", "qwen3", SIZES, weights("qwen3"), byte_vocab())
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("length", [2**63, 2**40, 10**6])
def test_a_length_that_cannot_be_is_an_error_at_once(tmp_path: Path, length: int) -> None:
    source = write_gguf(tmp_path / "m.gguf", "qwen3", SIZES, weights("qwen3"), byte_vocab())
    data = bytearray(source.read_bytes())
    key = b"tokenizer.ggml.tokens"
    at = data.index(key) + len(key) + 4 + 4  # the value's type, and its elements'
    data[at : at + 8] = length.to_bytes(8, "little")
    source.write_bytes(data)
    with pytest.raises(CheckpointError, match="elements"):
        convert(source, tmp_path / "out")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_a_damaged_header_converts_or_is_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    source = write_gguf(folder / "m.gguf", "qwen3", SIZES, weights("qwen3", tied=True), byte_vocab())
    data = bytearray(source.read_bytes())
    for at, patch in damage:
        data[at : at + len(patch)] = patch
    source.write_bytes(data)
    try:
        convert(source, folder / "out")
    except CheckpointError:
        assert [path.name for path in folder.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(("arch", "name"), [("llama", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")])
def test_a_sliding_window_is_kept(tmp_path: Path, arch: str, name: str) -> None:
    vocab = byte_vocab(extra={f"{arch}.attention.sliding_window": 64, "tokenizer.ggml.eot_token_id": 7})
    config = read_config(converted(tmp_path, arch, vocab=vocab)[0])
    assert config.architecture == f"{name}ForCausalLM"
    assert config.sliding_window == 64
    assert config.eos_token_ids == (262, 7, 263)


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="llama with experts"):
        converted(tmp_path, "llama", vocab=byte_vocab(extra={"llama.expert_count": 8}))
