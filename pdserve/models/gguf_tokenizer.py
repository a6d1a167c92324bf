"""Rebuild tokenizer.json and tokenizer_config.json from the vocabulary inside a GGUF file.

Two kinds of vocabulary are understood: byte-level BPE with merges (`gpt2`), whose pre-tokenizer GGUF only
names, and sentencepiece BPE with scores (`llama`), from which the merges are derived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from pdserve.core.errors import CheckpointError
from pdserve.models.files import write_json
from pdserve.models.gguf_metadata import Metadata

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a family cuts text before merging: each pattern cuts the pieces the one before it left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a token as a whole is taken as it is."""
    nfc: bool = False
    add_bos: bool = False
    """When the file does not say."""


_SMOLLM = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer(
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), ignore_merges=True, add_bos=True
)
_QWEN2 = PreTokenizer((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",), nfc=True)
_TEKKEN = PreTokenizer(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    ignore_merges=True,
    add_bos=True,
)
# What llama.cpp does for a vocabulary whose converter did not know the pre-tokenizer.
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    "default": _DEFAULT,
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    tokens: list[str]
    kinds: list[int]
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None

    def text(self, token: int | None) -> str | None:
        return None if token is None else self.tokens[token]


def write_tokenizer(meta: Metadata, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises `CheckpointError` for a vocabulary that is not
    understood or contradicts itself."""
    vocabulary = _read_vocabulary(meta)
    kind = meta.get_str("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(meta, vocabulary)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(meta, vocabulary)
    else:
        raise meta.wrong("tokenizer.ggml.model", "gpt2 (byte-level BPE) or llama (sentencepiece BPE)", kind)
    stated_bos = meta.get_bool("tokenizer.ggml.add_bos_token")
    add_bos = (add_bos if stated_bos is None else stated_bos) and vocabulary.bos is not None
    add_eos = bool(meta.get_bool("tokenizer.ggml.add_eos_token")) and vocabulary.eos is not None
    _add_tokens(tokenizer, vocabulary, meta.file)
    _set_template(tokenizer, vocabulary, add_bos=add_bos, add_eos=add_eos)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _config(meta, vocabulary, add_bos=add_bos, add_eos=add_eos))


def _config(meta: Metadata, vocabulary: Vocabulary, *, add_bos: bool, add_eos: bool) -> dict[str, object]:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "bos_token": vocabulary.text(vocabulary.bos),
        "eos_token": vocabulary.text(vocabulary.eos),
        "unk_token": vocabulary.text(vocabulary.unknown),
        "pad_token": vocabulary.text(vocabulary.padding),
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get_str("tokenizer.chat_template"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _read_vocabulary(meta: Metadata) -> Vocabulary:
    tokens = meta.get_list("tokenizer.ggml.tokens")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise meta.wrong("tokenizer.ggml.tokens", "a list of strings", tokens and len(tokens))
    kinds = meta.get_list("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens) or not all(isinstance(kind, int) for kind in kinds):
        raise meta.wrong("tokenizer.ggml.token_type", f"{len(tokens)} integers, one a token", len(kinds))
    if len(set(tokens)) != len(tokens):
        raise meta.wrong("tokenizer.ggml.tokens", "all different", "duplicates")

    def special(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token = meta.get_int(key)
        if token is not None and not 0 <= token < len(tokens):
            raise meta.wrong(key, f"a token id below {len(tokens)}", token)
        return token

    return Vocabulary(
        tokens=cast("list[str]", tokens),
        kinds=cast("list[int]", kinds),
        bos=special("bos"),
        eos=special("eos"),
        unknown=special("unknown"),
        padding=special("padding"),
    )


def _byte_level(meta: Metadata, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    name = meta.get_str("tokenizer.ggml.pre") or "default"
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise meta.wrong("tokenizer.ggml.pre", f"one of {', '.join(PRE_TOKENIZERS)}", name)
    merges = [_split_merge(meta, merge) for merge in meta.get_list("tokenizer.ggml.merges") or []]
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = _build(meta, vocab, merges, ignore_merges=pre.ignore_merges)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _split_merge(meta: Metadata, merge: object) -> tuple[str, str]:
    # A token never starts with a space (byte-level BPE writes it as Ġ), but may in principle hold one.
    if isinstance(merge, str):
        left, space, right = merge.partition(" ")
        if space and left and right:
            return left, right
    raise meta.wrong("tokenizer.ggml.merges", "pairs of tokens with a space between", merge)


def _sentencepiece(meta: Metadata, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    scores = meta.get_list("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        found = None if scores is None else len(scores)
        raise meta.wrong("tokenizer.ggml.scores", f"{len(vocabulary.tokens)} numbers, one a token", found)
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = _merges_from_scores(vocabulary, cast("list[float]", scores))
    unknown = vocabulary.text(vocabulary.unknown)
    if unknown is None:
        unknown = next(
            (t for t, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == _UNKNOWN), None
        )
    has_bytes = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    tokenizer = _build(meta, vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    prefix = meta.get_bool("tokenizer.ggml.add_space_prefix")
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is None or prefix:
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer, True


def _merges_from_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score of the result first.

    Sentencepiece joins the neighbours whose union has the best score; a merge list in that order makes
    `tokenizers` do the same. Where scores are equal (Llama 2's runs of spaces all have -1e9) sentencepiece
    goes from left to right, so that the left piece grows: the longer left piece comes first.
    """
    index = {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    }
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, i in index.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in index and right in index:
                ranked.append((-scores[i], -len(left), -len(right), i, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _build(
    meta: Metadata, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: object
) -> Tokenizer:
    # tokenizers takes any failure of the Rust side (a merge of unknown tokens, for one) to a plain Exception
    try:
        return Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), **options))
    except Exception as error:
        raise CheckpointError(
            f"{meta.file}: its vocabulary and merges do not fit together: {error}"
        ) from error


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, file: str) -> None:
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size() != len(vocabulary.tokens):
        raise CheckpointError(f"{file}: its special tokens do not fit its vocabulary")


def _set_template(tokenizer: Tokenizer, vocabulary: Vocabulary, *, add_bos: bool, add_eos: bool) -> None:
    bos, eos = vocabulary.text(vocabulary.bos), vocabulary.text(vocabulary.eos)
    specials = [
        (text, tokenizer.token_to_id(text))
        for text, used in ((bos, add_bos), (eos, add_eos))
        if used and text is not None
    ]
    if not specials:
        return
    first, last = [bos] if add_bos else [], [eos] if add_eos else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B:1", *last],
        special_tokens=specials,
    )
