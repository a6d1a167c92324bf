"""`pdserve logs` finds every line of a request, of whatever process, and no other's."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from pdserve.cli.app import app
from pdserve.cli.logs import lines_of

COORDINATOR = """\
2026-11-20T17:40:01.100Z INFO    coordinator request=r-1 accepted model=m
2026-11-20T17:40:01.105Z INFO    coordinator request=r-10 accepted model=m
2026-11-20T17:40:01.900Z ERROR   coordinator request=r-1 attempt=r-1#0 handling it failed
Traceback (most recent call last):
  ValueError: no
2026-11-20T17:40:02.000Z INFO    coordinator request=r-2 accepted model=m
"""


def session(folder: Path) -> Path:
    (folder / "pdserve-coordinator.log").write_text(COORDINATOR)
    line = {
        "ts": "2026-11-20T17:40:01.300Z",
        "origin": "decode-0",
        "attempt": "r-1.0#0",
        "message": "reserved",
    }
    (folder / "worker-abc-1.err").write_text(":actor_name:x\n" + json.dumps(line) + "\n")
    (folder / "raylet.out").write_text("2026-11-20T17:40:01.000Z r-1\n")
    return folder


def test_lines_of_all_processes_come_in_order_with_tracebacks_and_samples(tmp_path: Path) -> None:
    found = [line for _, line in sorted(lines_of("r-1", session(tmp_path)))]
    assert len(found) == 5
    assert "accepted" in found[0]
    assert json.loads(found[1])["message"] == "reserved"
    assert found[2].endswith("handling it failed")
    assert found[3].startswith("Traceback")
    assert found[4].strip() == "ValueError: no"


def test_the_command_prints_them_and_says_where_it_looked_when_there_are_none(tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["logs", "r-2", "--dir", str(session(tmp_path))])
    assert shown.exit_code == 0
    assert shown.output.strip() == "2026-11-20T17:40:02.000Z INFO    coordinator request=r-2 accepted model=m"
    assert runner.invoke(app, ["logs", "r-3", "--dir", str(tmp_path)]).exit_code == 1
