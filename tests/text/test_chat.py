"""Chat templates: rendered as transformers renders them, and kept in their sandbox."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pdserve.core.errors import CheckpointError, InvalidRequest
from pdserve.text.chat import ChatMessage, ChatTemplate
from pdserve.text.tokenizer import Tokenizer
from tests.support.paths import shared
from tests.support.tokenizers_files import byte_level_dir

TALK = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="<b>2 & 2?</b>"),
    ChatMessage(role="assistant", content="<think>\nsum\n</think>\n4"),
    ChatMessage(role="user", content="and 3?"),
]


def render(source: str, messages: list[ChatMessage] | None = None, **options: object) -> str:
    template = ChatTemplate(
        source, {"bos_token": "<s>"}, file="test", now=lambda: datetime(2026, 3, 4, 5, 6, 7)
    )
    return template.render(
        messages or [ChatMessage(role="user", content="hi")],
        add_generation_prompt=True,
        tools=None,
        options=options,
    )


def test_special_tokens_options_and_the_generation_prompt_reach_the_template() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ mode }}{% if add_generation_prompt %}>{% endif %}"
    assert render(source, mode="!") == "<s>hi!>"


def test_blocks_leave_no_lines_behind() -> None:
    source = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert render(source) == "hi\n"


def test_tojson_escapes_no_html_and_keeps_unicode() -> None:
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'


def test_the_clock_is_the_callers() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "04 Mar 2026"


def test_loop_controls_and_generation_blocks_are_known() -> None:
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source) == "01"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"


def test_a_template_that_refuses_a_conversation_makes_a_bad_request_with_its_words() -> None:
    with pytest.raises(InvalidRequest, match=r"messages.*roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_an_empty_conversation_is_a_bad_request() -> None:
    template = ChatTemplate("x", {}, file="test")
    with pytest.raises(InvalidRequest, match="at least one"):
        template.render([], add_generation_prompt=True, tools=None, options={})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content + 1 }}",
        "{{ 'a' + 1 }}",
        "{% set x = namespace() %}{{ x.y.z }}",
        "{{ strftime_now(3) }}",
        "{{ range(10**9) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_or_crash_the_server(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


def test_a_template_that_does_not_compile_is_a_broken_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{% for %}", {}, file="test")


def test_a_template_file_comes_before_the_config(tmp_path: Path) -> None:
    folder = byte_level_dir(tmp_path, config={"chat_template": "config"})
    assert Tokenizer.from_dir(folder).apply_chat_template(TALK) == "config"
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_dir(folder).apply_chat_template(TALK) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_dir(folder).apply_chat_template(TALK) == "jinja"


def test_named_templates_are_chosen_by_whether_there_are_tools(tmp_path: Path) -> None:
    templates = [{"name": name, "template": name} for name in ("default", "tool_use")]
    tokenizer = Tokenizer.from_dir(byte_level_dir(tmp_path, config={"chat_template": templates}))
    assert tokenizer.apply_chat_template(TALK) == "default"
    assert tokenizer.apply_chat_template(TALK, tools=[{"type": "function"}]) == "tool_use"


@cache
def qwen_3() -> tuple[Tokenizer, Any]:
    from transformers import PreTrainedTokenizerFast

    folder = shared("tokenizers/qwen3")
    return Tokenizer.from_dir(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": False}, {"enable_thinking": False}], ids=str
)
@pytest.mark.parametrize("with_tools", [False, True])
def test_qwen_3_renders_as_transformers_does(options: dict[str, bool], with_tools: bool) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    talk = [*TALK]
    if with_tools:
        talk += [
            ChatMessage(role="assistant", content="", tool_calls=tuple(calls)),
            ChatMessage(role="tool", content="4", name="add"),
        ]
    tokenizer, oracle = qwen_3()
    theirs = oracle.apply_chat_template(
        [message.for_template() for message in talk],
        tokenize=False,
        tools=[tool] if with_tools else None,
        **({"add_generation_prompt": True} | options),
    )
    ours = tokenizer.apply_chat_template(
        talk,
        tools=[tool] if with_tools else None,
        **options,  # type: ignore[arg-type]  # a mix of one parameter and template options
    )
    assert ours == theirs
