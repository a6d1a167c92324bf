"""The Dockerfile keeps to the rules for one, as far as that can be said without building it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from coordinator.service import Coordinator
from pdserve.deploy.pods import GRPC_PORT, METRICS_PORT
from tests.support.paths import REPO

DOCKERFILE = REPO / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(word, rest) in order; continued lines are one."""
    lines = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ").splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_built_in_one_stage_and_runs_in_another_that_is_not_roots() -> None:
    words = instructions()
    assert [word for word, _ in words].count("FROM") == 2
    last = words[max(index for index, (word, _) in enumerate(words) if word == "FROM") :]
    assert not [rest for word, rest in last if word == "RUN" and "pip install" in rest]
    assert ("USER", "1000") in last
    (copied,) = [rest for word, rest in last if word == "COPY"]
    assert copied.startswith("--from=build ")


def test_its_ports_are_those_of_the_manifests_and_it_asks_after_its_own_health() -> None:
    last = dict(instructions())
    assert last["EXPOSE"].split() == [str(GRPC_PORT), str(METRICS_PORT)]
    assert "pdserve health" in last["HEALTHCHECK"]


def test_all_packages_are_copied() -> None:
    copied = {rest.split()[0] for word, rest in instructions() if word == "COPY"}
    roots = {
        path.parent.name
        for path in REPO.glob("*/__init__.py")
        if path.parent.name not in ("tests", "benchmarks")
    }
    assert {Coordinator.__module__.partition(".")[0], "kernels"} <= copied
    assert roots <= copied
