"""Incremental text equals full decoding, wherever the stream of tokens is cut."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.text.detokenizer import IncrementalDetokenizer
from pdserve.text.tokenizer import Tokenizer
from tests.support.paths import shared
from tests.support.tokenizers_files import byte_level_dir, sentencepiece_dir

REPLACEMENT = "\ufffd"
TOKENIZERS = ["byte-level", "sentencepiece", "models/stories15M", "models/stories260K", "tokenizers/qwen3"]
TEXT = "The théâtre 日本語 🤗👩‍👩‍👧 مرحبا\n  end"


@cache
def tokenizer_of(name: str) -> Tokenizer:
    makers = {"byte-level": byte_level_dir, "sentencepiece": sentencepiece_dir}
    if name in makers:
        with TemporaryDirectory() as folder:
            return Tokenizer.from_dir(makers[name](Path(folder)))
    return Tokenizer.from_dir(shared(name))


def streamed(tokenizer: Tokenizer, pieces: list[list[int]], **options: bool) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]  # booleans only
    return "".join(detokenizer.push(piece) for piece in pieces) + detokenizer.flush()


def in_pieces(ids: list[int], cuts: list[int]) -> list[list[int]]:
    borders = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in pairwise(borders)]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip_special", [True, False])
def test_random_ids_cut_anywhere_give_the_full_text(name: str, skip_special: bool) -> None:
    tokenizer = tokenizer_of(name)
    byte_fallback = "stories" in name or name == "sentencepiece"
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 2) | st.integers(0, 270), max_size=30)

    @settings(max_examples=300, deadline=None)
    @given(ids, st.lists(st.integers(0, 30), max_size=6))
    def check(tokens: list[int], cuts: list[int]) -> None:
        ours = streamed(tokenizer, in_pieces(tokens, cuts), skip_special_tokens=skip_special)
        assert ours == tokenizer.decode(tokens, skip_special_tokens=skip_special)
        theirs = tokenizer._inner.decode(tokens, skip_special_tokens=skip_special)
        # an invalid run of byte tokens is spoilt as a whole by `tokenizers`, see text/token_bytes.py
        if not byte_fallback or REPLACEMENT not in theirs:
            assert ours == theirs

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_of_valid_text_ever_holds_half_a_character(name: str) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token]) for token in ids]
    assert detokenizer.flush() == ""
    assert all(REPLACEMENT not in piece for piece in pieces)
    assert "".join(pieces) == TEXT


def test_a_character_appears_with_its_last_byte_and_not_before() -> None:
    tokenizer = tokenizer_of("sentencepiece")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([3 + byte]) for byte in "🤗é".encode()] == ["", "", "", "🤗", "", "é"]


def test_an_unfinished_character_becomes_one_replacement_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(tokenizer_of("sentencepiece"))
    assert detokenizer.push([3 + byte for byte in "🤗".encode()[:3]]) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_valid_characters_survive_an_invalid_byte_after_them() -> None:
    detokenizer = IncrementalDetokenizer(tokenizer_of("sentencepiece"))
    assert detokenizer.push([3 + byte for byte in "é".encode()]) == "é"
    assert detokenizer.push([3 + 0xFF]) == REPLACEMENT
    assert detokenizer.push([3 + ord("a")]) == "a"


def test_the_first_space_of_an_answer_on_its_own_is_dropped_and_after_a_prompt_kept() -> None:
    tokenizer = tokenizer_of("sentencepiece")
    hi = tokenizer.encode("hi", add_special_tokens=False)
    assert streamed(tokenizer, [hi, hi]) == "hi hi"
    after = IncrementalDetokenizer(tokenizer, prompt_tokens=hi)
    assert after.push(hi) == " hi"
    begin = IncrementalDetokenizer(tokenizer, prompt_tokens=[1])  # <s> alone is no text
    assert begin.push(hi) == "hi"


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("cut", range(1, 40))
def test_prompt_and_answer_together_are_the_whole_text(name: str, cut: int) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    prompt, answer = ids[:cut], ids[cut:]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_tokens=prompt)
    text = detokenizer.push(answer) + detokenizer.flush()
    # a character that the prompt breaks off belongs, whole, to the answer
    assert tokenizer.decode(prompt).removesuffix(REPLACEMENT) + text == TEXT


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("<s>the<tool></s>")
    assert streamed(tokenizer, [[token] for token in ids]) == "the<tool>"
    assert streamed(tokenizer, [ids], skip_special_tokens=False) == "<s>the<tool></s>"


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_bytes_that_are_no_text_are_not_hoarded(name: str) -> None:
    tokenizer = tokenizer_of(name)
    lone = next(token for token in range(300) if tokenizer.token_bytes[token] == b"\xff")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert all(detokenizer.push([lone]) == REPLACEMENT for _ in range(10_000))
