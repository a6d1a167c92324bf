"""A worker with a real engine in a process of its own, in a network namespace where one is given.

Arguments: a JSON object with `role`, `model`, `socket`, `config` and `namespace` (null: this one's). Prints
"ready" when it listens, ends when its standard input does. Its socket is a file, so that whoever cuts the
network between two workers does not cut them off from the coordinator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.network_namespaces import enter
from pdserve.core.config import ServeConfig
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.elastic.worker import start_worker
from pdserve.worker.spec import WorkerSpec
from tests.support.paths import REPO


class WorkerProcess:
    """Starts in `with`; ends with it."""

    def __init__(
        self, role: Role, model: Path, socket: Path, config: ServeConfig, namespace: str | None = None
    ) -> None:
        self.address = f"unix:{socket}"
        asked = {
            "role": role.value,
            "model": str(model),
            "socket": str(socket),
            "config": config.model_dump(mode="json"),
            "namespace": namespace,
        }
        self._command = [sys.executable, "-m", "tests.support.worker_process", json.dumps(asked)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def until_ready(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            status = self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process.stdout.close()
        assert status == 0


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    enter(asked["namespace"])
    role = Role(asked["role"])
    spec = WorkerSpec(
        worker=WorkerId(f"{role.value}-0"),
        role=role,
        epoch=1,
        config=ServeConfig.model_validate(asked["config"]),
        model_dir=Path(asked["model"]),
        listen=f"unix:{asked['socket']}",
        num_threads=1,
    )
    worker = start_worker(spec)
    print("ready", flush=True)
    sys.stdin.read()
    worker.stop()
    worker.wait()


if __name__ == "__main__":
    main()
