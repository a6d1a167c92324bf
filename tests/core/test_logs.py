"""Log lines in both shapes: ids where they belong, secrets nowhere, and the terminal as it was."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.logs import BackgroundLog, about, handler_of, is_said_in_passing, log_worker, redacted
from pdserve.core.operation_settings import LogFormat, LoggingSettings

ATTEMPT = AttemptId(RequestId("r-1"), 2)
JSON = LoggingSettings(format=LogFormat.JSON)
HUMAN = LoggingSettings()


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Logging as a process begins with it, put back afterwards."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    logger.handlers[:] = []
    logger.setLevel(logging.WARNING)
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def lines_of(settings: LoggingSettings, *records: logging.LogRecord) -> list[str]:
    stream = io.StringIO()
    handler = handler_of(settings, origin="decode-0", stream=stream)
    for record in records:
        handler.handle(record)
    return stream.getvalue().splitlines()


def record(
    message: str, *args: object, name: str = "decode.x", level: int = logging.INFO
) -> logging.LogRecord:
    return logging.LogRecord(name, level, "file", 1, message, args, None)


def test_a_line_with_an_attempt_among_its_arguments_is_about_that_attempt() -> None:
    (line,) = lines_of(JSON, record("push %d of %s came late", 3, ATTEMPT))
    entry = json.loads(line)
    assert (entry["request"], entry["attempt"]) == ("r-1", "r-1#2")
    assert entry["origin"] == "decode-0"
    assert entry["level"] == "info"
    assert entry["message"] == "push 3 of r-1#2 came late"


def test_more_fields_come_along_and_those_without_a_value_do_not() -> None:
    told = record("reserved")
    told.__dict__.update(about(attempt=ATTEMPT, blocks=4, tenant=None))
    (line,) = lines_of(JSON, told)
    entry = json.loads(line)
    assert entry["blocks"] == 4
    assert "tenant" not in entry
    (human,) = lines_of(HUMAN, told)
    assert human.endswith(" INFO    decode-0 request=r-1 attempt=r-1#2 reserved blocks=4")


def test_a_line_with_a_newline_stays_one_object() -> None:
    (line,) = lines_of(JSON, record("two\nlines"))
    assert json.loads(line)["message"] == "two\nlines"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ('{"api_key": "sk-123456"}', '{"api_key": "***"}'),
        ("password=hunter2, next", "password=***, next"),
        ("auth_token='deadbeef'", "auth_token='***'"),
        ("output_tokens=12 token 7", "output_tokens=12 token 7"),
    ],
)
def test_what_looks_like_a_credential_is_blotted_out(text: str, left: str) -> None:
    assert redacted(text) == left


def test_secrets_in_fields_and_arguments_are_blotted_out_too() -> None:
    told = record("calling with %s", "Bearer abcdefgh")
    told.__dict__.update(about(api_key="sk-1"))
    for settings in (JSON, HUMAN):
        (line,) = lines_of(settings, told)
        assert "abcdefgh" not in line
        assert "sk-1" not in line


def test_other_packages_are_heard_from_warnings_on_and_requests_only_where_wanted() -> None:
    quiet = LoggingSettings(requests=False)
    chatter, loud = record("hm", name="grpc"), record("oh", name="grpc", level=logging.WARNING)
    request = record("accepted", name="pdserve.request")
    assert len(lines_of(HUMAN, chatter, loud, request)) == 2
    assert len(lines_of(quiet, chatter, loud, request)) == 1


def test_a_background_log_writes_a_file_and_leaves_the_terminal_as_it_was(
    root: logging.Logger, tmp_path: Path
) -> None:
    terminal = io.StringIO()
    root.addHandler(logging.StreamHandler(terminal))
    path = tmp_path / "log"
    written = BackgroundLog(JSON, [handler_of(JSON, origin="coordinator", file=path)])
    logging.getLogger("coordinator.x").info("placed %s", ATTEMPT)
    logging.getLogger("coordinator.x").warning("worker lost")
    written.close()
    logging.getLogger("coordinator.x").warning("afterwards")
    assert [json.loads(line)["message"] for line in path.read_text().splitlines()] == [
        "placed r-1#2",
        "worker lost",
    ]
    assert terminal.getvalue() == "worker lost\nafterwards\n"
    assert root.level == logging.WARNING


def test_a_muted_terminal_speaks_again_afterwards(root: logging.Logger) -> None:
    terminal, instead = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(terminal)
    root.addHandler(handler)
    written = BackgroundLog(JSON, [handler_of(JSON, origin="coordinator", stream=instead)], muted=[handler])
    logging.getLogger("coordinator.x").error("during")
    written.close()
    logging.getLogger("coordinator.x").error("after")
    assert terminal.getvalue() == "after\n"
    assert json.loads(instead.getvalue())["message"] == "during"


def test_a_worker_process_logs_to_standard_error_at_once(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    root.handlers[:] = []  # pytest's own
    log_worker(JSON, "prefill-0")
    logging.getLogger("prefill.x").info("hello")
    assert json.loads(capsys.readouterr().err)["origin"] == "prefill-0"
    log_worker(JSON, "another")  # a process that logs already is left alone
    assert len(root.handlers) == 1


@pytest.mark.parametrize("settings", [JSON, HUMAN])
def test_what_was_said_in_passing_is_told_from_what_may_explain_an_end(settings: LoggingSettings) -> None:
    passing, warned = lines_of(settings, record("prompt read"), record("no room", level=logging.WARNING))
    assert is_said_in_passing(passing)
    assert not is_said_in_passing(warned)
    assert not is_said_in_passing("RuntimeError: INFO is not what was expected")
