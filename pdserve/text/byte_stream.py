"""UTF-8 text out of a stream of tokens, given the bytes of each."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final

from pdserve.text.token_bytes import TokenBytes

_LONGEST_CHARACTER: Final = 4
"""Bytes of a UTF-8 character at most, hence of the tokens that can share one."""


class ByteStream:
    """State: an unfinished character of at most three bytes, and the leading spaces still to drop."""

    def __init__(self, token_bytes: TokenBytes, *, skip_special_tokens: bool) -> None:
        self._bytes = token_bytes
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces = token_bytes.leading_spaces
        self._begun = False

    def skip(self, ids: Sequence[int]) -> None:
        """Take these tokens as said already."""
        tail: list[int] = []
        for token in reversed(ids):
            if self._shows(token):
                tail.append(token)
            if len(tail) == _LONGEST_CHARACTER:
                break
        if tail:
            self._spaces = 0
            self._utf8.decode(self._join(tail[::-1]))

    def push(self, ids: Sequence[int]) -> str:
        return self._without_leading_spaces(self._utf8.decode(self._join(ids)))

    def flush(self) -> str:
        return self._without_leading_spaces(self._utf8.decode(b"", final=True))

    def _shows(self, token: int) -> bool:
        return bool(self._bytes[token]) and not (self._skip_special and self._bytes.is_special(token))

    def _join(self, ids: Sequence[int]) -> bytes:
        pieces: list[bytes] = []
        for token in ids:
            if self._shows(token):
                if self._begun:
                    pieces.append(self._bytes.separator)
                pieces.append(self._bytes[token])
                self._begun = True
        return b"".join(pieces)

    def _without_leading_spaces(self, text: str) -> str:
        while self._spaces and text:
            if not text.startswith(" "):
                self._spaces = 0
                break
            text = text[1:]
            self._spaces -= 1
        return text
