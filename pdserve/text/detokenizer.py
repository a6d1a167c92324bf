"""Text of a stream of tokens, piece by piece and never half a character."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.text.byte_stream import ByteStream
from pdserve.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Constant work per token. All pieces joined, `flush()` last, are `Tokenizer.decode` of all tokens.

    Bytes that belong to no character become U+FFFD as soon as that is certain.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt_tokens: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        """prompt_tokens: what the text continues. A character that the prompt left unfinished comes out whole
        with the first tokens, and a leading space is kept, as it is inside a text."""
        self._stream = ByteStream(tokenizer.token_bytes, skip_special_tokens=skip_special_tokens)
        self._stream.skip(prompt_tokens)

    def push(self, ids: Sequence[int]) -> str:
        """The text that has become certain with these tokens; may be empty. Unknown ids have no text."""
        return self._stream.push(ids)

    def flush(self) -> str:
        """What an unfinished character at the end becomes: U+FFFD, or nothing where there is none."""
        return self._stream.flush()
