"""A worker's start is told by phase, each with its own time."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

from pdserve.cluster.start_times import READY, StartPhase, StartTimes, phase_of
from pdserve.core.ids import WorkerId
from pdserve.worker.hosting import Progress
from tests.support.paths import REPO

SPEAKERS = ("pdserve/engine/build.py", "pdserve/models/weights.py", "pdserve/models/cpu.py")
SPEAKERS += ("pdserve/models/local_copy.py", "pdserve/worker/hosting.py", "pdserve/cluster/ray_worker.py")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def heard(*told: tuple[float, str, str]) -> list[tuple[WorkerId, Mapping[str, float]]]:
    """told: (when, worker, words)."""
    clock, started = Clock(), list[tuple[WorkerId, Mapping[str, float]]]()
    times = StartTimes(lambda worker, seconds: started.append((worker, seconds)), clock)
    for clock.now, worker, words in told:
        times.told(WorkerId(worker), READY if words == READY.text else Progress(fraction=0.5, text=words))
    return started


def test_each_phase_lasts_until_the_next_words() -> None:
    ((worker, seconds),) = heard(
        (10.0, "decode-0", "starting its process"),
        (12.0, "decode-0", "reading the configuration"),
        (12.5, "decode-0", "loading layer 1 of 2"),
        (13.5, "decode-0", "loading layer 2 of 2"),
        (15.0, "decode-0", "allocating the KV cache"),
        (15.25, "decode-0", "registering memory for transfers"),
        (15.5, "decode-0", "ready"),
    )
    assert worker == "decode-0"
    assert seconds == {
        StartPhase.PROCESS: 2.0,
        StartPhase.WEIGHTS: 3.0,
        StartPhase.KV_CACHE: 0.25,
        StartPhase.TRANSFER: 0.25,
    }


def test_workers_that_start_together_are_told_apart_and_a_failed_start_counts_for_nothing() -> None:
    started = heard(
        (0.0, "prefill-0", "starting its process"),
        (1.0, "decode-0", "starting its process"),
        (2.0, "prefill-0", "reading the configuration"),
        (50.0, "prefill-0", "starting its process"),
        (51.0, "decode-0", "ready"),
        (53.0, "prefill-0", "ready"),
    )
    assert [(worker, sum(seconds.values())) for worker, seconds in started] == [
        ("decode-0", 50.0),
        ("prefill-0", 3.0),
    ]


@pytest.mark.parametrize("path", SPEAKERS)
def test_whatever_a_worker_says_on_its_way_has_a_phase(path: str) -> None:
    said = list(words_in(REPO / path))
    assert said
    assert [words for words in said if phase_of(words) is StartPhase.OTHER] == []


def words_in(path: Path) -> list[str]:
    """The beginnings of texts given to functions called say, progress, and to Progress(text=...)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        texts = list(node.args) if name in ("say", "progress") else []
        texts += [one.value for one in node.keywords if name == "Progress" and one.arg == "text"]
        for text in texts:
            start = text.values[0] if isinstance(text, ast.JoinedStr) else text
            if isinstance(start, ast.Constant) and isinstance(start.value, str):
                found.append(start.value)
    return found
