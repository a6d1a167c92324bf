"""What bytes each token stands for, read from the decoder of a tokenizer.json.

Text is a byte stream cut into tokens at places that need not be character borders. With the bytes of each
token at hand, a decoder for UTF-8 is all that streaming needs: constant work per token, exact at every cut.
(Decoding a window of tokens again and again, the usual way, is quadratic on a run of invalid bytes, and must
guess where a character ends.)

Understood are the decoders of the served families: byte-level BPE (Llama 3, Qwen, SmolLM), and
sentencepiece's pieces with byte fallback (Llama 2, Mistral), as a sequence of steps or as Metaspace.

Where byte-fallback tokens form no character, `tokenizers` spoils the whole run of them, valid characters
included, once the run is over; here the valid ones stay, which a stream could not take back anyway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast

import tokenizers

from pdserve.core.errors import CheckpointError

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ToBytes = Callable[[str], bytes]


def _byte_level_alphabet() -> dict[str, int]:
    """The character by which GPT-2's BPE writes each byte: a printable one itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_ALPHABET: Final[Mapping[str, int]] = _byte_level_alphabet()


class TokenBytes:
    """Bytes of every token, looked up once each.

    `leading_spaces` of the text as a whole are dropped (sentencepiece puts one before the first word).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, file: str) -> None:
        """Raises `CheckpointError` for a decoder of another kind."""
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._special = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )
        self.separator = b""
        """Between two tokens: a tokenizer without a decoder joins its words with a space."""
        self.leading_spaces = 0
        self._to_bytes = self._read_decoder(file)

    def __getitem__(self, token: int) -> bytes:
        """The bytes of a token; none for an id that the vocabulary does not have."""
        found = self._known.get(token)
        if found is None:
            text = self._tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
            found = self._known[token] = b"" if text is None else self._to_bytes(text)
        return found

    def is_special(self, token: int) -> bool:
        """Whether `skip_special_tokens` leaves it out."""
        return token in self._special

    def _read_decoder(self, file: str) -> _ToBytes:
        decoder = self._tokenizer.decoder
        if decoder is None:
            self.separator = b" "
            return lambda text: text.encode()
        tree = json.loads(decoder.__getstate__())
        steps = tree["decoders"] if tree["type"] == "Sequence" else [tree]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return _byte_level
        if kinds == ["Metaspace"]:
            self.leading_spaces = 0 if steps[0].get("prepend_scheme") == "never" else 1
            return _pieces([(str(steps[0]["replacement"]), " ")], byte_fallback=False)
        replacements = self._read_steps(steps, file)
        return _pieces(replacements, byte_fallback="ByteFallback" in kinds)

    def _read_steps(self, steps: Sequence[Mapping[str, object]], file: str) -> list[tuple[str, str]]:
        replacements: list[tuple[str, str]] = []
        fused = False
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                    replacements.append((old, new))
                case {"type": "ByteFallback"} if not fused:
                    pass
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Metaspace", "replacement": str(old)} if not fused:
                    replacements.append((old, " "))
                    self.leading_spaces = 0 if step.get("prepend_scheme") == "never" else 1
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                    self.leading_spaces = start
                case _:
                    raise CheckpointError(
                        f"{file}: decoder step {json.dumps(step, ensure_ascii=False)[:80]} is not supported; "
                        "byte-level and sentencepiece decoders are"
                    )
        return replacements


def _byte_level(text: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in text])
    except KeyError:
        return text.encode()  # an added token, written as itself


def _pieces(replacements: Sequence[tuple[str, str]], *, byte_fallback: bool) -> _ToBytes:
    def to_bytes(text: str) -> bytes:
        for old, new in replacements:
            text = text.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(text) if byte_fallback else None
        return text.encode() if byte is None else bytes([int(cast(str, byte[1]), 16)])

    return to_bytes
