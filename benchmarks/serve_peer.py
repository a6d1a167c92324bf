"""Starts one of the peers and keeps it up until SIGTERM: for `pdserve bench`, whose scenario files name it.

    python -m benchmarks.serve_peer vllm --port 8200
    python -m benchmarks.serve_peer vllm-disaggregated --port 8201 --prefill-port 8200

The ports are OpenAI endpoints. A disaggregated pair has no proxy: a client asks the prefill instance first,
and hands what that says to the decode instance (`prefill_address` in a scenario file).
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import Final

from benchmarks.environment import REPO
from benchmarks.peers import VLLM
from benchmarks.processes import Command, ProcessSet, ServerDied, allowed_cores
from benchmarks.systems.vllm import serve_command
from pdserve.models.store import DEFAULT_MODEL, resolve

_LOOK_EVERY_S: Final = 1.0
_STOP_GRACE_S: Final = 20.0


def commands_of(arguments: argparse.Namespace) -> list[Command]:
    model, cores, logs = resolve(arguments.model), allowed_cores(), arguments.logs

    def one(port: int, on: list[int], role: str | None = None) -> Command:
        return serve_command(
            model,
            port=port,
            cores=on,
            role=role,
            venv_root=arguments.root,
            kv_gib=arguments.kv_gib,
            log=logs / f"vllm{'' if role is None else '-' + role}.log",
        )

    if arguments.system == "vllm":
        return [one(arguments.port, list(cores))]
    half = max(1, len(cores) // 2)
    return [
        one(arguments.prefill_port, list(cores[:half]), "kv_producer"),
        one(arguments.port, list(cores[-half:]), "kv_consumer"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_peer", description=__doc__)
    parser.add_argument("system", choices=("vllm", "vllm-disaggregated"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill-port", type=int, help="of the prefill instance")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--kv-gib", type=int, default=1, help="KV cache of each instance")
    parser.add_argument("--logs", type=Path, default=Path("out/sla/logs"))
    parser.add_argument("--root", type=Path, default=REPO, help="folder of the peers' environments")
    arguments = parser.parse_args()
    if arguments.system == "vllm-disaggregated" and arguments.prefill_port is None:
        parser.error("--prefill-port is needed")
    if not VLLM.is_ready(arguments.root):
        parser.error(f"no vLLM in {arguments.root}: python -m benchmarks.peers setup vllm")
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    processes = ProcessSet()
    print(f"what it says is in {arguments.logs.resolve()}", flush=True)
    try:
        for command in commands_of(arguments):
            processes.spawn(command)
        while not told.wait(_LOOK_EVERY_S):
            processes.raise_if_dead()
    except ServerDied as death:
        print(death, file=sys.stderr)
        return 1
    finally:
        processes.stop(grace_s=_STOP_GRACE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
