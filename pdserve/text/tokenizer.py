"""A model's tokenizer: tokenizer.json, and what tokenizer_config.json adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers.processors import TemplateProcessing

from pdserve.core.errors import CheckpointError, InvalidRequest
from pdserve.text import generation_defaults
from pdserve.text.byte_stream import ByteStream
from pdserve.text.chat import ChatMessage, ChatTemplate
from pdserve.text.json_file import JsonObject, read_object_if_there
from pdserve.text.token_bytes import TokenBytes

__all__ = ["ChatMessage", "Tokenizer"]

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Thread-safe; encoding leaves the interpreter free for other threads."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        file: str,
        eos_token_ids: tuple[int, ...] = (),
        bos_token_id: int | None = None,
        chat_template: ChatTemplate | None = None,
        tool_template: ChatTemplate | None = None,
    ) -> None:
        inner.no_truncation()  # a prompt is refused when too long, never cut in silence
        inner.no_padding()
        self._inner = inner
        self._chat_template = chat_template
        self._tool_template = tool_template or chat_template
        self.token_bytes = TokenBytes(inner, file)
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = bos_token_id

    @classmethod
    def from_dir(cls, folder: Path, *, now: Callable[[], datetime] = datetime.now) -> Tokenizer:
        """Read a model directory. Raises `CheckpointError` naming the file that cannot be used.

        now: the clock that chat templates see.
        """
        path = folder / "tokenizer.json"
        inner = _read_tokenizer(path)
        config_path = folder / "tokenizer_config.json"
        config = read_object_if_there(config_path) or JsonObject(str(config_path), {})
        special = _special_tokens(config, read_object_if_there(folder / "special_tokens_map.json"))
        _apply_flags(inner, config, special)
        defaults = generation_defaults.load(folder)
        bos, eos = (_id_of(inner, special.get(name)) for name in ("bos_token", "eos_token"))
        templates = {
            name: ChatTemplate(source, special, file=str(folder), now=now)
            for name, source in _template_sources(folder, config).items()
        }
        return cls(
            inner,
            file=str(path),
            eos_token_ids=defaults.eos_token_ids or (() if eos is None else (eos,)),
            bos_token_id=defaults.bos_token_id if bos is None else bos,
            chat_template=templates.get("default"),
            tool_template=templates.get("tool_use"),
        )

    @property
    def vocab_size(self) -> int:
        """Tokens with a text; a model's own vocabulary may be padded beyond it."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; the names of special tokens in the text become those tokens, as in Hugging Face.

        Raises `InvalidRequest` for text that is not Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(field="prompt", value=text[:40], limit=f"valid Unicode: {error}") from error
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of all ids; bytes that are no character become U+FFFD, ids outside the vocabulary nothing."""
        stream = ByteStream(self.token_bytes, skip_special_tokens=skip_special_tokens)
        return stream.push(ids) + stream.flush()

    def apply_chat_template(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **options: object,
    ) -> str:
        """The conversation as one prompt, to be encoded with `add_special_tokens=False`.

        options: whatever the template knows, such as `enable_thinking`. Raises `InvalidRequest` when the
        model has no template or its template refuses the conversation.
        """
        template = self._chat_template if tools is None else self._tool_template
        if template is None:
            raise InvalidRequest(
                field="messages",
                value=f"{len(messages)} messages",
                limit="absent: this model has no chat template, send a prompt instead",
            )
        return template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, options=options
        )


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; a model needs its tokenizer in this form")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other type, whatever is wrong with the file
        raise CheckpointError(f"{path}: not a tokenizer that can be read: {error}") from error


def _special_tokens(config: JsonObject, older: JsonObject | None) -> dict[str, str]:
    """Special tokens by name; older checkpoints keep them in special_tokens_map.json."""
    found: dict[str, str] = {}
    for source in (older, config):
        for name in _SPECIAL:
            if source is not None and name in source:
                value = source.data[name]
                text = source.get_object(name) if isinstance(value, dict) else source
                content = text.get_str("content" if isinstance(value, dict) else name) if text else None
                if content:
                    found[name] = content
    return found


def _id_of(inner: tokenizers.Tokenizer, text: str | None) -> int | None:
    return None if text is None else inner.token_to_id(text)


def _apply_flags(inner: tokenizers.Tokenizer, config: JsonObject, special: Mapping[str, str]) -> None:
    """`add_bos_token` and `add_eos_token`, where stated, override what tokenizer.json puts around a text."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    around: list[list[str]] = [[], []]
    known: list[tuple[str, int]] = []
    for side, (flag, name) in zip(
        around, (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")), strict=True
    ):
        text = special.get(name)
        token = _id_of(inner, text)
        if config.get_bool(flag) and text is not None:
            if token is None:
                raise CheckpointError(f"{config.file}: {name} {text!r} is not in the vocabulary")
            side.append(text)
            known.append((text, token))
    before, after = around
    inner.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=known,
    )


def _template_sources(folder: Path, config: JsonObject) -> dict[str, str]:
    """Templates by name, `default` first of all: a file of its own, or in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not readable: {error}") from error
    separate = read_object_if_there(folder / "chat_template.json")
    source = config if separate is None else separate
    if not isinstance(source.data.get("chat_template"), list):
        text = source.get_str("chat_template")
        return {} if text is None else {"default": text}
    found: dict[str, str] = {}
    for entry in source.get_list("chat_template") or []:
        match entry:
            case {"name": str(name), "template": str(text)}:
                found[name] = text
            case _:
                raise source.wrong("chat_template", "a string or a list of named templates")
    return found
