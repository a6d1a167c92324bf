"""A model directory without weights, whose tokens are bytes: token i is the character chr(i)."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = {0: "<eos>"}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_scripted_model(folder: Path, *, chat: bool = True, max_model_len: int = 512) -> Path:
    """Vocabulary of 256 bytes, id 0 is the end of an answer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {(_shown(byte)): byte for byte in range(256)}
    vocab = {SPECIAL.get(byte, text): byte for text, byte in vocab.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": 256, "max_position_embeddings": max_model_len, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    extras = {"chat_template": TEMPLATE} if chat else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", **extras}))
    return folder


def _shown(byte: int) -> str:
    """How byte-level BPE writes a byte: those without a glyph, in order, from U+0100."""
    glyphs = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in glyphs:
        return chr(byte)
    others = [b for b in range(256) if b not in glyphs]
    shown = chr(0x100 + others.index(byte))
    assert shown in ByteLevel.alphabet()
    return shown
