"""How much of the transfer a client waits for: exposed milliseconds beside the time to the first token.

    python -m benchmarks.transfer_exposed --output build/exposed.json

The KV cache of an 8B Llama (32 layers, 8 KV heads of 128, bfloat16: 128 KiB a token, blocks of 64) goes
between two processes as a prefill worker sends it: per chunk and layer group, while the next group computes.
Computing is a pause as long as an accelerator of `--tokens-per-s` would take, so that the figures are the
transfer's: what is exposed is the time from the end of computing to the last push's completion, and to its
note's event in the receiver. Prompts at a time share the accelerator, a chunk each in turn, and the link. The
pools hold `--pool-tokens`; longer prompts go around in them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from benchmarks.environment import describe_environment
from benchmarks.network_namespaces import available
from benchmarks.transfer_pair import TWO_NAMESPACES, Pair, Transport, connected, transports
from kvtransfer.protocol import Outcome, PushEnded
from pdserve.core.layout import CacheGroup, GroupLayout

LLAMA_8B: Final = GroupLayout(
    group=CacheGroup(name="8b", num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
    block_tokens=64,
)
LENGTHS: Final = (128, 512, 2048, 8192, 32768)
CONCURRENT: Final = (1, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """Medians over rounds and prompts."""

    transport: str
    path: str
    prompt_tokens: int
    concurrent: int
    tokens_per_s: float
    """Of the accelerator."""
    ttft_ms: float
    """From the first chunk's start to the last push's completion."""
    sender_ms: float
    """From the end of computing to the last push's completion."""
    receiver_ms: float
    """From the end of computing to the note's event."""
    best_share: float
    """The least share of a prompt's TTFT that its exposed time at the receiver was."""

    @property
    def share(self) -> float:
        return self.receiver_ms / (self.ttft_ms - self.sender_ms + self.receiver_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and as which accelerator."""

    lengths: tuple[int, ...] = LENGTHS
    concurrent: tuple[int, ...] = CONCURRENT
    rounds: int = 2
    """Of the longest prompts; of short ones up to four times as many."""
    tokens_per_s: float = 10_000.0
    chunk: int = 512
    """Tokens of a step."""
    layer_groups: int = 4
    pool_tokens: int = 4096
    most_tokens: int = 32768
    """Of all prompts at a time."""


@dataclass(slots=True)
class _Prompt:
    index: int
    num_blocks: int
    sent_blocks: int = 0
    last_push: int = -1
    began: float = 0.0
    computed: float = 0.0


def play(pair: Pair, plan: Plan, num_tokens: int, concurrent: int, first_id: int) -> list[_Prompt]:
    """Read the prompts, a chunk each in turn; returns with every push submitted."""
    size, layers = LLAMA_8B.block_tokens, LLAMA_8B.group.num_layers
    per_group = layers // plan.layer_groups
    pool_blocks = plan.pool_tokens // size
    prompts = [_Prompt(i, -(-num_tokens // size)) for i in range(concurrent)]
    next_id = first_id
    turns = list(prompts)
    while turns:
        prompt = turns.pop(0)
        prompt.began = prompt.began or time.monotonic()
        count = min(plan.chunk // size, prompt.num_blocks - prompt.sent_blocks)
        start = prompt.index * pool_blocks // concurrent + prompt.sent_blocks
        blocks = [(start + i) % pool_blocks for i in range(count)]
        for first in range(0, layers, per_group):
            _compute(count * size * per_group / layers / plan.tokens_per_s)
            prompt.computed = time.monotonic()
            pair.sender.submit(
                next_id, 0, blocks, blocks, f"prompt {prompt.index}", (first, min(first + per_group, layers))
            )
            prompt.last_push, next_id = next_id, next_id + 1
        prompt.sent_blocks += count
        if prompt.sent_blocks < prompt.num_blocks:
            turns.append(prompt)
    return prompts


def _compute(seconds: float) -> None:
    """As long as an accelerator would be busy; this process's core is free meanwhile."""
    time.sleep(seconds)


def measure(transport: Transport, plan: Plan) -> list[Exposed]:
    rows = []
    pool_bytes = plan.pool_tokens // LLAMA_8B.block_tokens * LLAMA_8B.block_bytes
    with connected(transport, pool_bytes, groups=(LLAMA_8B,)) as pair:
        ids = itertools.count(0, 1_000_000)
        _round(pair, plan, min(plan.lengths), 1, next(ids))
        for concurrent in plan.concurrent:
            for num_tokens in plan.lengths:
                if num_tokens * concurrent > plan.most_tokens:
                    continue
                times = plan.rounds * min(max(8192 // num_tokens, 1), 4)
                rounds = [_round(pair, plan, num_tokens, concurrent, next(ids)) for _ in range(times)]
                rows.append(_row(transport, pair, plan, num_tokens, concurrent, rounds))
    return rows


def _round(
    pair: Pair, plan: Plan, num_tokens: int, concurrent: int, first_id: int
) -> list[tuple[float, float, float]]:
    """TTFT, exposed at the sender and at the receiver, of each prompt; seconds."""
    pair.take_notes()
    prompts = play(pair, plan, num_tokens, concurrent, first_id)
    last = {prompt.last_push: prompt for prompt in prompts}
    total = max(last) - first_id + 1
    ended: dict[int, float] = {}
    for _ in range(total):
        event = pair.sender.wait()
        if not isinstance(event, PushEnded) or event.outcome is not Outcome.COMPLETED:
            raise RuntimeError(f"the push failed: {event}")
        ended[event.id] = pair.sender.ended_at(event.id)
    notes = pair.take_notes(total)
    found = []
    for push_id, prompt in last.items():
        sender = max(ended[push_id] - prompt.computed, 0.0)
        found.append((ended[push_id] - prompt.began, sender, notes[push_id]))
    return found


def _row(
    transport: Transport,
    pair: Pair,
    plan: Plan,
    num_tokens: int,
    concurrent: int,
    rounds: Sequence[Sequence[tuple[float, float, float]]],
) -> Exposed:
    every = [one for found in rounds for one in found]
    ttft, sender, receiver = (1e3 * statistics.median(one[i] for one in every) for i in range(3))
    return Exposed(
        transport=transport.name,
        path=pair.path.path,
        prompt_tokens=num_tokens,
        concurrent=concurrent,
        tokens_per_s=plan.tokens_per_s,
        ttft_ms=ttft,
        sender_ms=sender,
        receiver_ms=receiver,
        best_share=min(noted / (first - ended + noted) for first, ended, noted in every),
    )


def table(rows: Sequence[Exposed]) -> str:
    lines = [
        "| transport | path | tokens/s | prompt tokens | prompts at a time | TTFT ms | exposed, sender ms "
        "| exposed, receiver ms | share of TTFT | at best |",
        "|" + "---|" * 10,
    ]
    lines += [
        f"| {r.transport} | {r.path} | {r.tokens_per_s:,.0f} | {r.prompt_tokens} | {r.concurrent} "
        f"| {r.ttft_ms:.0f} | {r.sender_ms:.1f} | {r.receiver_ms:.1f} | {r.share:.1%} | {r.best_share:.1%} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--transports", default="", help="only those with this in their name")
    for name in ("rounds", "chunk", "layer_groups", "pool_tokens", "most_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Plan(), name))
    parser.add_argument("--tokens-per-s", type=float, default=Plan().tokens_per_s, help="of the accelerator")
    given = vars(parser.parse_args())
    output, wanted = given.pop("output"), given.pop("transports")
    plan = Plan(**given)
    environment = describe_environment()
    rows: list[Exposed] = []
    with transports(namespaces=available() and wanted in TWO_NAMESPACES) as chosen:
        for transport in chosen:
            if wanted in transport.name:
                rows += measured_alone(transport, plan)
    print(json.dumps(dataclasses.asdict(environment)))
    print(f"{json.dumps(dataclasses.asdict(plan))}\n")
    print(table(rows))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": dataclasses.asdict(environment),
            "config": dataclasses.asdict(plan),
            "rows": [{**dataclasses.asdict(row), "share": row.share} for row in rows],
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


def measured_alone(transport: Transport, plan: Plan) -> list[Exposed]:
    """In a process of its own: UCX keeps what it once found out about the machine."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(measure, transport, plan).result()


if __name__ == "__main__":
    main()
