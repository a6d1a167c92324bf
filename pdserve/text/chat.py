"""Render a conversation with the model's own Jinja chat template, in a sandbox.

The environment offers what Hugging Face's does, because templates are written against it: `raise_exception`,
`strftime_now`, a `tojson` that escapes no HTML, `break` and `continue`, and `{% generation %}` blocks.
Reference: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.core.errors import CheckpointError, InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn. The optional fields reach the template only when they are set."""

    role: str
    content: str
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[Mapping[str, object], ...] = ()

    def for_template(self) -> dict[str, object]:
        turn: dict[str, object] = {"role": self.role, "content": self.content}
        optional = {"name": self.name, "tool_call_id": self.tool_call_id, "tool_calls": list(self.tool_calls)}
        return turn | {key: value for key, value in optional.items() if value}


class ChatTemplate:
    """A compiled template, with the model's special tokens bound by name (`bos_token`, `eos_token`, ...)."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        file: str,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """now: the clock of `strftime_now`. Raises `CheckpointError` for a template that does not compile."""
        self._special_tokens = dict(special_tokens)
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise CheckpointError(f"{file}: the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None,
        options: Mapping[str, object],
    ) -> str:
        """Raises `InvalidRequest` when the template refuses the conversation or cannot render it."""
        if not messages:
            raise InvalidRequest(field="messages", value=[], limit="at least one message")
        values = {
            **self._special_tokens,
            **options,
            "messages": [message.for_template() for message in messages],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ) as error:
            roles = ", ".join(message.role for message in messages[:8])
            raise InvalidRequest(
                field="messages", value=roles, limit=f"a conversation the model's template accepts: {error}"
            ) from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for serving it is its body alone."""

    tags = {"generation"}  # noqa: RUF012 - the base class has a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> str:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
