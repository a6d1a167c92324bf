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
from benchmarks.transfer import TWO_NAMESPACES, transports
from benchmarks.transfer_pair import Pair, Transport, connected
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
    ttft_ms: float
    """From the first chunk's start to the last push's completion."""
    sender_ms: float
    """From the end of computing to the last push's completion."""
    receiver_ms: float
    """From the end of computing to the note's event."""

    @property
    def share(self) -> float:
        return self.receiver_ms / (self.ttft_ms - self.sender_ms + self.receiver_ms)


@dataclass(slots=True)
class _Prompt:
    index: int
    num_blocks: int
    sent_blocks: int = 0
    last_push: int = -1
    began: float = 0.0
    computed: float = 0.0


def play(
    pair: Pair, args: argparse.Namespace, num_tokens: int, concurrent: int, first_id: int
) -> list[_Prompt]:
    """Read the prompts, a chunk each in turn; returns with every push submitted."""
    size, layers = LLAMA_8B.block_tokens, LLAMA_8B.group.num_layers
    per_group = layers // args.layer_groups
    pool_blocks = args.pool_tokens // size
    prompts = [_Prompt(i, -(-num_tokens // size)) for i in range(concurrent)]
    next_id = first_id
    turns = list(prompts)
    while turns:
        prompt = turns.pop(0)
        prompt.began = prompt.began or time.monotonic()
        count = min(args.chunk // size, prompt.num_blocks - prompt.sent_blocks)
        start = prompt.index * pool_blocks // concurrent + prompt.sent_blocks
        blocks = [(start + i) % pool_blocks for i in range(count)]
        for first in range(0, layers, per_group):
            _compute(count * size * per_group / layers / args.tokens_per_s)
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


def measure(transport: Transport, args: argparse.Namespace) -> list[Exposed]:
    rows = []
    pool_bytes = args.pool_tokens // LLAMA_8B.block_tokens * LLAMA_8B.block_bytes
    with connected(transport, pool_bytes, groups=(LLAMA_8B,)) as pair:
        first_id = 0
        for concurrent in CONCURRENT:
            for num_tokens in LENGTHS:
                if num_tokens * concurrent > args.most_tokens:
                    continue
                rounds = []
                for _ in range(args.rounds + 1):
                    rounds.append(_round(pair, args, num_tokens, concurrent, first_id))
                    first_id += 1_000_000
                rows.append(_row(transport, pair, num_tokens, concurrent, rounds[1:]))
    return rows


def _round(
    pair: Pair, args: argparse.Namespace, num_tokens: int, concurrent: int, first_id: int
) -> list[tuple[float, float, float]]:
    """TTFT, exposed at the sender and at the receiver, of each prompt; seconds."""
    pair.take_notes()
    prompts = play(pair, args, num_tokens, concurrent, first_id)
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
        ttft_ms=ttft,
        sender_ms=sender,
        receiver_ms=receiver,
    )


def table(rows: Sequence[Exposed]) -> str:
    lines = [
        "| transport | path | prompt tokens | prompts at a time | TTFT ms | exposed, sender ms "
        "| exposed, receiver ms | share of TTFT |",
        "|" + "---|" * 8,
    ]
    lines += [
        f"| {r.transport} | {r.path} | {r.prompt_tokens} | {r.concurrent} | {r.ttft_ms:.0f} "
        f"| {r.sender_ms:.1f} | {r.receiver_ms:.1f} | {r.share:.1%} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens-per-s", type=float, default=10_000.0, help="of the accelerator")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step")
    parser.add_argument("--layer-groups", type=int, default=4)
    parser.add_argument("--pool-tokens", type=int, default=4096)
    parser.add_argument("--most-tokens", type=int, default=32768, help="of all prompts at a time")
    parser.add_argument("--transports", default="", help="only those with this in their name")
    args = parser.parse_args()
    environment = describe_environment()
    rows: list[Exposed] = []
    with transports(namespaces=available() and args.transports in TWO_NAMESPACES) as chosen:
        for transport in chosen:
            if args.transports in transport.name:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    rows += fresh.submit(measure, transport, args).result()
    config = {key: value for key, value in vars(args).items() if key not in ("output", "transports")}
    print(json.dumps(dataclasses.asdict(environment)))
    print(f"{json.dumps(config)}\n")
    print(table(rows))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": dataclasses.asdict(environment),
            "config": config,
            "rows": [{**dataclasses.asdict(row), "share": row.share} for row in rows],
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
