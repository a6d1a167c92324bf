"""A worker's lines about a request: one per message, none per token."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.messages import AttemptFailed, Cancel, FinishReason, KvArrived, Message, Reserved, Tokens
from pdserve.worker.journal import Journal

ATTEMPT = AttemptId(RequestId("r"), 1)


@pytest.fixture(autouse=True)
def informed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pdserve.request")


def fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = record.__dict__["fields"]
    return found


def test_each_step_is_a_line_with_the_attempt_and_its_figures(caplog: pytest.LogCaptureFixture) -> None:
    messages: list[Message] = [
        Reserved(attempt=ATTEMPT, blocks=[], cached_tokens=16),
        KvArrived(attempt=ATTEMPT),
        Tokens(attempt=ATTEMPT, first_index=3, tokens=[1], finish_reason=FinishReason.STOP),
        Cancel(attempt=ATTEMPT, reason="the client went away"),
    ]
    journal = Journal(enabled=True)
    for message in messages:
        journal.note(message)
    lines = caplog.records
    said = [line.getMessage() for line in lines]
    assert said == ["reserved", "KV arrived", "answer complete", "told to stop"]
    assert {fields(line)["attempt"] for line in lines} == {"r#1"}
    assert fields(lines[2])["output_tokens"] == 4


def test_tokens_on_the_way_are_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    Journal(enabled=True).note(Tokens(attempt=ATTEMPT, first_index=3, tokens=[1]))
    assert caplog.records == []


def test_a_failure_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    failed = AttemptFailed(attempt=ATTEMPT, code="UNAVAILABLE", message="gone", retryable=True)
    Journal(enabled=True).note(failed)
    assert caplog.records[0].levelno == logging.WARNING


def test_a_journal_that_is_off_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    Journal(enabled=False).note(KvArrived(attempt=ATTEMPT))
    assert caplog.records == []
