"""What every system is asked: prompt lengths, answer lengths, and the prompts themselves."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One round of one system. Answers always have exactly the asked length (EOS is ignored), greedily."""

    ttft_prompt_tokens: int = 512
    ttft_output_tokens: int = 4
    ttft_repeats: int = 3
    single_prompt_tokens: int = 128
    single_output_tokens: int = 128
    streams: int = 16
    stream_prompt_tokens: int = 128
    stream_output_tokens: int = 64

    @property
    def longest_sequence_tokens(self) -> int:
        return max(
            self.ttft_prompt_tokens + self.ttft_output_tokens,
            self.single_prompt_tokens + self.single_output_tokens,
            self.stream_prompt_tokens + self.stream_output_tokens,
        )


FULL: Final = Workload()
QUICK: Final = Workload(ttft_repeats=1, single_output_tokens=24, stream_output_tokens=16)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The same prompt twice: `text` encodes to exactly `token_ids` (checked when it is made)."""

    token_ids: tuple[int, ...]
    text: str


class PromptSource:
    """Random prompts, a new one for every request, so that no prefix cache ever helps anyone.

    Some servers take token ids, others take only text. The ids are drawn from whole words with a leading
    space, which the tokenizer never merges with their neighbours: one prompt serves both kinds.
    """

    _WORD: Final = re.compile(r" [A-Za-z]{2,12}")

    def __init__(self, model_dir: Path, *, seed: int) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._seed = seed
        self._words = self._single_token_words()
        if len(self._words) < 256:
            raise ValueError(f"{model_dir}: only {len(self._words)} words are one token each; wanted 256")

    def make(self, num_tokens: int, *key: object) -> Prompt:
        """The prompt named by `key`: the same key gives the same prompt, in every system and every run."""
        draw = random.Random(":".join(map(str, (self._seed, num_tokens, *key))))
        token_ids = tuple(draw.choices(self._words, k=num_tokens))
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        if tuple(self._tokenizer.encode(text).ids) != token_ids:
            raise ValueError(f"prompt {key} of {num_tokens} tokens does not survive decoding and encoding")
        return Prompt(token_ids, text)

    def _single_token_words(self) -> list[int]:
        words = []
        for token in range(self._tokenizer.get_vocab_size()):
            text = self._tokenizer.decode([token], skip_special_tokens=False)
            if self._WORD.fullmatch(text) and self._tokenizer.encode(text).ids == [token]:
                words.append(token)
        return words
