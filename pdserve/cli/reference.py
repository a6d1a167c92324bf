"""Pages of the documentation that come from code: `python -m pdserve.cli.reference DIRECTORY` writes them.

A test compares the committed pages with what this makes, so that they cannot fall behind.
"""

from __future__ import annotations

import enum
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pdserve.cli.metrics_page import metrics_page
from pdserve.core.config import ServeConfig
from pdserve.core.lifecycle import NEXT, TERMINAL, Phase

_MEANING: Final[dict[Phase, str]] = {
    Phase.QUEUED: "waits for a place: new, or sent back after an attempt was lost",
    Phase.ADMITTED: "a decode worker was chosen and asked to reserve blocks",
    Phase.PREFILLING: "the prompt is being read; finished layers already travel",
    Phase.TRANSFERRING: "the prompt is read, its last KV blocks are on the way",
    Phase.DECODING: "the decode worker has everything and writes the answer",
    Phase.MIGRATING: "the request moves from one decode worker to another",
    Phase.FINISHED: "the answer is complete",
    Phase.FAILED: "no attempt is left, or its deadline passed; the client got a typed error",
    Phase.CANCELLED: "the client went away or cancelled",
    Phase.REJECTED: "refused before any work, with the reason and when to try again",
}


def lifecycle_page() -> str:
    """docs/lifecycle.md, from the transition table."""
    lines = [
        "# The life of a request",
        "",
        "Generated from `pdserve/core/lifecycle.py` by `make docs`; do not edit.",
        "",
        "A request is in one phase at a time, and only the transitions drawn here exist: anything else",
        "raises `IllegalTransition`. Going back to `queued` starts a new attempt, with the tokens streamed",
        "so far as part of its prompt.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> queued",
        *(f"    {phase} --> {after}" for phase in Phase for after in sorted(NEXT[phase], key=_order)),
        *(f"    {phase} --> [*]" for phase in Phase if phase in TERMINAL),
        "```",
        "",
        "| Phase | What it means | Next |",
        "|---|---|---|",
        *(_phase_row(phase) for phase in Phase),
    ]
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """docs/configuration.md, from the configuration's classes and their docstrings."""
    lines = [
        "# Configuration",
        "",
        "Generated from `pdserve/core/config.py` by `make docs`; do not edit.",
        "",
        "`pdserve serve --config FILE` reads YAML with these sections; `--set section.key=value` and flags",
        "override it; `pdserve config show` prints the result. Unknown keys are errors.",
    ]
    plain: list[str] = []
    for name, field in ServeConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += ["", f"## {name}", "", *_TABLE_HEAD, *_rows(section)]
            for key, inner in section.model_fields.items():
                entry = _entry_type(inner.annotation)
                if entry is not None:
                    lines += ["", f"### {name}.{key}.NAME", "", *_TABLE_HEAD, *_rows(entry)]
        elif name == "models":
            entry = _entry_type(section)
            assert entry is not None
            text = " ".join((field.description or "").split())
            lines += ["", "## models", "", "A list. " + text, "", *_TABLE_HEAD, *_rows(entry)]
        else:
            plain.append(_row(name, field))
    lines += ["", "## Top level", "", *_TABLE_HEAD, *plain]
    return "\n".join(lines) + "\n"


def knobs() -> Iterator[tuple[str, str, str]]:
    """(path, type, default) of every key of the configuration."""
    for name, field in ServeConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            for key, inner in section.model_fields.items():
                yield f"{name}.{key}", type_name(inner.annotation), _default(inner)
                entry = _entry_type(inner.annotation)
                for inmost, field in (entry.model_fields if entry else {}).items():
                    yield f"{name}.{key}.NAME.{inmost}", type_name(field.annotation), _default(field)
        else:
            yield name, type_name(field.annotation), _default(field)


PAGES: Final = {
    "metrics.md": metrics_page,
    "lifecycle.md": lifecycle_page,
    "configuration.md": configuration_page,
}

_TABLE_HEAD: Final = ("| Key | Type | Default | Meaning |", "|---|---|---|---|")


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML knows it."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (dict, tuple):
        return "mapping" if origin is dict else "list"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(annotation, str(annotation))


def _entry_type(annotation: Any) -> type[BaseModel] | None:
    """What a mapping from names to settings, or a list of them, holds; None for anything else."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (dict, tuple):
        value = arguments[origin is dict]
        if isinstance(value, type) and issubclass(value, BaseModel):
            return value
    return None


def _rows(section: type[BaseModel]) -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield _row(key, field)


def _row(key: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    return f"| `{key}` | {type_name(field.annotation)} | {_default(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "nothing"
    if isinstance(value, BaseModel):
        return "the section's"
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, dict) and value:
        return ", ".join(f"`{name}`" for name in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _phase_row(phase: Phase) -> str:
    after = ", ".join(next_phase.value for next_phase in sorted(NEXT[phase], key=_order)) or "(the end)"
    return f"| `{phase}` | {_MEANING[phase]} | {after} |"


def _order(phase: Phase) -> int:
    return list(Phase).index(phase)


def main() -> None:
    """Write every page into the directory given on the command line."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for name, page in PAGES.items():
        (directory / name).write_text(page())


if __name__ == "__main__":
    main()
