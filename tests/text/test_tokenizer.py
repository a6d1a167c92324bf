"""Tokenizers: special tokens, flags, ends, and directories that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve.core.errors import CheckpointError, InvalidRequest
from pdserve.text.tokenizer import ChatMessage, Tokenizer
from tests.support.paths import shared
from tests.support.tokenizers_files import byte_level_dir, sentencepiece_dir

SPECIAL: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("text", ["", "the théâtre", " the  the", "日本語 🤗 \x00\x7f", "a\r\nb\tc"])
@pytest.mark.parametrize("make", [byte_level_dir, sentencepiece_dir])
def test_text_survives_encoding_and_decoding(tmp_path: Path, make: Callable[[Path], Path], text: str) -> None:
    tokenizer = Tokenizer.from_dir(make(tmp_path))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_stated_flags_put_begin_and_end_around_a_text(tmp_path: Path) -> None:
    config = SPECIAL | {"add_bos_token": True, "add_eos_token": True}
    tokenizer = Tokenizer.from_dir(byte_level_dir(tmp_path, config=config))
    ids = tokenizer.encode("the")
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1:] == list(tokenizer.eos_token_ids)
    assert ids[1:-1] == tokenizer.encode("the", add_special_tokens=False)


def test_a_flag_that_says_no_overrides_the_post_processor(tmp_path: Path) -> None:
    folder = byte_level_dir(tmp_path, config=SPECIAL | {"add_bos_token": True})
    with_bos = Tokenizer.from_dir(folder)
    with_bos._inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    assert Tokenizer.from_dir(folder).encode("the") == with_bos.encode("the")
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"add_bos_token": False}))
    assert Tokenizer.from_dir(folder).encode("the") == with_bos.encode("the")[1:]


def test_special_tokens_may_be_objects_or_stand_in_their_own_file(tmp_path: Path) -> None:
    folder = byte_level_dir(tmp_path, config={"bos_token": {"content": "<s>", "lstrip": False}})
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "bos_token": "</s>"}')
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.decode([tokenizer.bos_token_id or 0], skip_special_tokens=False) == "<s>"
    assert tokenizer.decode(tokenizer.eos_token_ids, skip_special_tokens=False) == "</s>"


def test_ends_come_from_generation_config_then_from_the_tokenizer(tmp_path: Path) -> None:
    own = Tokenizer.from_dir(byte_level_dir(tmp_path / "a", config=SPECIAL))
    assert own.decode(own.eos_token_ids, skip_special_tokens=False) == "</s>"
    stated = byte_level_dir(tmp_path / "b", config=SPECIAL, generation={"eos_token_id": [3, 4]})
    assert Tokenizer.from_dir(stated).eos_token_ids == (3, 4)


def test_special_tokens_are_left_out_unless_asked_for_and_others_stay(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir(tmp_path))
    ids = tokenizer.encode("<s>the<tool></s>")
    assert tokenizer.decode(ids) == "the<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>the<tool></s>"


def test_ids_outside_the_vocabulary_have_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir(tmp_path))
    the = tokenizer.encode("the")
    assert tokenizer.decode([*the, 10**6, -1, 2**40, *the]) == "thethe"


def test_a_prompt_is_never_truncated_or_padded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir(tmp_path))
    tokenizer._inner.enable_truncation(4)
    tokenizer._inner.enable_padding(length=64)
    tokenizer._inner.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_dir(tmp_path).encode("x" * 50)) == 50


def test_text_that_is_not_unicode_is_a_bad_request(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir(tmp_path))
    with pytest.raises(InvalidRequest, match="prompt"):
        tokenizer.encode("broken \ud800 text")


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(byte_level_dir(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.apply_chat_template([ChatMessage(role="user", content="hi")])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"[" * 9999]
)
def test_a_broken_tokenizer_file_is_a_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_a_missing_tokenizer_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*missing"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 3},
        {"bos_token": {"content": 3}},
        {"add_bos_token": "yes"},
        {"bos_token": "<nope>", "add_bos_token": True},
        {"chat_template": 5},
        {"chat_template": ["x"]},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": "{% for %}"},
    ],
)
def test_a_wrong_tokenizer_config_is_a_typed_error(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        Tokenizer.from_dir(byte_level_dir(tmp_path, config=config))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "chat_template.json"])
def test_broken_json_beside_the_tokenizer_names_its_file(tmp_path: Path, name: str) -> None:
    folder = byte_level_dir(tmp_path)
    (folder / name).write_text("{oops")
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_dir(folder)


def test_a_decoder_that_is_not_understood_is_refused_at_load(tmp_path: Path) -> None:
    folder = byte_level_dir(tmp_path)
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize("model", ["models/stories15M", "models/stories260K"])
def test_reference_prompts_encode_to_their_reference_ids(model: str) -> None:
    folder = shared(model)
    tokenizer = Tokenizer.from_dir(folder)
    for case in json.loads((folder / "reference.json").read_text())["cases"]:
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]


@pytest.mark.parametrize("model", ["models/stories15M", "tokenizers/qwen3"])
def test_real_tokenizers_encode_as_transformers_does(model: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = shared(model)
    ours, theirs = Tokenizer.from_dir(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("", "Hello, world!", "  naïve 日本語 🤗\n\n<|im_end|></s> 12345", "<s>x"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
