"""What a long prompt costs that the pool had to let go of: from a tier, beside computed anew.

    python -m benchmarks.tiers --model SmolLM2-135M-Instruct --tokens 2000 --output build/tiers.json

Per tier (host memory, disk) one `pdserve serve` with a pool that holds one prompt. Each round asks a prompt
never seen before (computed), then another one (which takes the room of the first), then the first again (from
the tier). Ratios within a round are what to compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.environment import describe_environment
from pdserve.client.sync import Client

BLOCK_TOKENS: Final = 64
START_S: Final = 300.0
SETTLE_S: Final = 1.0
"""Longer than two heartbeats, and than copying one prompt's blocks out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Seconds to the first token, in the order of the rounds."""

    tier: str
    computed_s: list[float]
    from_tier_s: list[float]
    same_text: bool
    """The answer from the tier was the one from computing, every time."""

    @property
    def ratio(self) -> float:
        """Median over rounds of from the tier / computed."""
        pairs = zip(self.from_tier_s, self.computed_s, strict=True)
        return statistics.median(tier / computed for tier, computed in pairs)


@contextmanager
def service(model: str, cache: dict[str, object], log: Path) -> Iterator[str]:
    """A running `pdserve serve`; its address."""
    sets = [f"cache.{key}={value}" for key, value in cache.items()]
    sets += ["cluster.dashboard=false", "coordinator.port=0"]
    argv = [sys.executable, "-m", "pdserve.cli", "serve", "--model", model]
    argv += [part for each in sets for part in ("--set", each)]
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            process.wait(60)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"ready.*?(\d+\.\d+\.\d+\.\d+:\d+)", log.read_text(errors="replace"), re.DOTALL)
        if found:
            return found.group(1)
        time.sleep(0.2)  # another program's output: there is nothing to wake us
    raise RuntimeError(f"pdserve serve did not start:\n{log.read_text(errors='replace')[-2000:]}")


def first_token(client: Client, prompt: Sequence[int]) -> tuple[float, tuple[int, ...]]:
    """Seconds until it was here, and the answer."""
    began = time.perf_counter()
    tokens: list[int] = []
    first = 0.0
    for delta in client.stream(prompt_token_ids=prompt, max_tokens=8, temperature=0.0, ignore_eos=True):
        if delta.token_ids and not tokens:
            first = time.perf_counter() - began
        tokens += delta.token_ids
    return first, tuple(tokens)


def measure(tier: str, model: str, num_tokens: int, rounds: int, folder: Path) -> Figures:
    blocks = -(-num_tokens // BLOCK_TOKENS)
    cache: dict[str, object] = {"block_size": BLOCK_TOKENS, "num_blocks": blocks + 8}
    if tier == "disk":
        cache |= {"disk_tier_gib": 4, "disk_tier_path": folder / "tier"}
    else:
        cache |= {"host_tier_gib": 2}
    rng = random.Random(0)
    computed, again, same = [], [], True
    with service(model, cache, folder / f"{tier}.log") as address, Client(address) as client:
        first_token(client, [rng.randrange(1000, 20000) for _ in range(200)])
        for _ in range(rounds):
            prompt, other = ([rng.randrange(1000, 20000) for _ in range(num_tokens)] for _ in range(2))
            seconds, text = first_token(client, prompt)
            computed.append(seconds)
            time.sleep(SETTLE_S)
            first_token(client, other)
            time.sleep(SETTLE_S)
            seconds, text_again = first_token(client, prompt)
            again.append(seconds)
            same = same and text == text_again
    return Figures(tier=tier, computed_s=computed, from_tier_s=again, same_text=same)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as folder:
        figures = [
            measure(tier, args.model, args.tokens, args.rounds, Path(folder)) for tier in ("host", "disk")
        ]
    print(json.dumps(dataclasses.asdict(environment)))
    print("| tier | computed, TTFT s | from the tier, TTFT s | ratio, median of rounds | same tokens |")
    print("|" + "---|" * 5)
    for one in figures:
        computed, again = (", ".join(f"{s:.2f}" for s in v) for v in (one.computed_s, one.from_tier_s))
        print(f"| {one.tier} | {computed} | {again} | {one.ratio:.2f} | {'yes' if one.same_text else 'NO'} |")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": dataclasses.asdict(environment),
            "tokens": args.tokens,
            "figures": [{**dataclasses.asdict(one), "ratio": one.ratio} for one in figures],
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
