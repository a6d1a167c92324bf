"""`pdserve serve` as a process: it says when it is ready, answers `pdserve generate`, and leaves nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedModel

from tests.e2e.test_faults import has_ended
from tests.support.paths import REPO

pytestmark = pytest.mark.ray

PDSERVE = [sys.executable, "-m", "pdserve.cli"]


def test_serve_answers_and_leaves_no_process_and_no_file_behind(
    tiny_oracle: tuple[Path, PreTrainedModel],
) -> None:
    settings = ["--set", "cache.num_blocks=64", "--set", "cache.block_size=16", "--no-dashboard"]
    serve = subprocess.Popen(
        [*PDSERVE, "serve", "--model", str(tiny_oracle[0]), "--port", "0", *settings],
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    try:
        address = _until_ready(serve)
        started = psutil.Process(serve.pid).children(recursive=True)
        titles = [" ".join(child.cmdline()) for child in started]
        # An actor at rest is named after its class or, once it has told Ray of its state, after its worker.
        for role in ("prefill", "decode"):
            assert any(re.match(rf"ray::{role}(Actor|-\d)", title, re.IGNORECASE) for title in titles), titles
        (run_dir,) = {Path(found) for title in titles for found in re.findall(r"/tmp/pdserve-[^/\s]+", title)}
        assert run_dir.stat().st_mode & 0o777 == 0o700
        answer = subprocess.run(
            [*PDSERVE, "generate", "--raw", "the", "--address", address, "--max-tokens", "4", "--json"],
            capture_output=True,
            text=True,
            cwd=REPO,
            timeout=60,
        )
        assert answer.returncode == 0, answer.stderr
        last = json.loads(answer.stdout.splitlines()[-1])
        assert last["usage"]["completion_tokens"] == 4

        serve.send_signal(signal.SIGTERM)
        _, said = serve.communicate(timeout=60)
        assert serve.returncode == 0, said
        assert "stopped" in said
        assert "Traceback" not in said
        assert [child for child in started if not has_ended(child)] == []
        assert not run_dir.exists()
    finally:
        serve.kill()
        serve.communicate()


def _until_ready(serve: subprocess.Popen[str]) -> str:
    assert serve.stderr is not None
    seen = []
    for line in serve.stderr:
        seen.append(line)
        if found := re.search(r"gRPC\s+(\S+)", line):
            return found[1]
    raise AssertionError("it ended before it was ready:\n" + "".join(seen))
