"""A prefill and a decode worker of which the coordinator has learned how fast they are, and work for them."""

from __future__ import annotations

from dataclasses import replace

from coordinator.fleet import Fleet, WorkerState
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import Role
from tests.support.model_workers import ModelDecode, worker_info

MODEL = "m"
PROMPT = 128
READ_S = 0.18
"""Of the prompt, alone: the rates here are those of SmolLM2-135M on one core."""


def attempt(name: str) -> AttemptId:
    return AttemptId(RequestId(name), 0)


def pair() -> tuple[WorkerState, WorkerState, Fleet]:
    fleet = Fleet()
    for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)):
        info = worker_info(name, role, num_blocks=4096, max_num_seqs=64)
        fleet.add(WorkerState(info=info, model=MODEL))
    prefill, decode = fleet.get(WorkerId("prefill-0")), fleet.get(WorkerId("decode-0"))
    assert prefill is not None
    assert decode is not None
    teach(prefill, decode)
    return prefill, decode, fleet


def teach(prefill: WorkerState, decode: WorkerState) -> None:
    """Prompts of 128 take 0.18 s, a step 15 ms and 3 ms for each answer in it."""
    now = 0.0
    for index in range(30):
        tokens = 32 * (1 + index % 8)
        prefill.latency.prompt_sent(attempt(f"t{index}"), tokens, now)
        now += READ_S * tokens / PROMPT
        prefill.latency.prompt_read(attempt(f"t{index}"), now)
        now += 1.0
    model = ModelDecode(decode.info)
    for index in range(1, 30):
        running = 1 + index % 16
        beat = replace(
            model.heartbeat(), steps=index, running=running, waiting_tokens=160 * running, step_s=0.0
        )
        decode.latency.heard(replace(beat, step_s=0.015 + 0.003 * running))


def run_at(decode: WorkerState, count: int, *, tpot_target_s: float | None = None) -> None:
    """Answers that are being written."""
    for index in range(count):
        decode.place_decode(attempt(f"d{index}"), PROMPT, tpot_target_s)
        decode.reserved(attempt(f"d{index}"))
        decode.decodes(attempt(f"d{index}"))


def queue_at(prefill: WorkerState, count: int) -> None:
    for index in range(count):
        prefill.place_prefill(attempt(f"p{index}"), PROMPT, due=0.0)
