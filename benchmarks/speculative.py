"""What guessing tokens is worth on a CPU: `python -m benchmarks.speculative [MODEL]`.

One worker, no server: the scheduler's steps over the engine, greedy, one thread. Plain decoding, guesses
where they pay, and guesses always take turns in one process; the best of each is shown. The answers are
compared: in bfloat16 a step with more rows may round otherwise, so that near-ties can fall differently.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from decode.drafting import PromptLookup
from decode.speculation import Speculation
from pdserve.core.config import CacheSettings, ModelSettings
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import RequestSpec, Role, StartDecode, Tokens
from pdserve.core.sampling import SamplingParams
from pdserve.elastic.scheduler import ElasticScheduler
from pdserve.elastic.worker import ElasticRole
from pdserve.engine.build import Engine, build_engine
from pdserve.models import store
from pdserve.text.chat import ChatMessage
from pdserve.text.tokenizer import Tokenizer
from pdserve.worker.events import Action, FromCoordinator, OwnerId, Send
from pdserve.worker.running import longest_sequence
from pdserve.worker.shared import Shared

ROUNDS: Final = 3
ANSWER: Final = 128
_OWNER: Final = OwnerId(0)
_PASSAGE: Final = (
    "The harbour lies on the eastern side of the bay, behind a breakwater that was finished in 1887. Two "
    "ferries leave every morning, one to the islands and one along the coast to the north. In winter the "
    "northern line is closed when the wind is above force eight, and passengers are taken by bus. The "
    "harbour office sells tickets from six in the morning; children under seven travel free of charge."
)
_CODE: Final = (
    "def area(shape):\n    if shape.kind == 'circle':\n        return 3.14159 * shape.radius ** 2\n"
    "    if shape.kind == 'square':\n        return shape.side ** 2\n    if shape.kind == 'rectangle':\n"
    "        return shape.width * shape.height\n    raise ValueError(shape.kind)\n"
)
PROMPTS: Final = {
    "copy": f"Repeat the following text word for word, and nothing else.\n\n{_PASSAGE}",
    "edit": f"Rename the variable `shape` to `figure` in this code and print all of it.\n\n{_CODE}",
    "free": "Write a short story about a lighthouse keeper who finds a letter.",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    tokens_per_s: float
    proposed: int
    accepted: int
    answers: list[list[int]]


def run(engine: Engine, prompts: Sequence[list[int]], speculation: Speculation | None) -> Outcome:
    """Read the prompts, then write all answers together; timed from when the last prompt has been read."""
    shared = Shared(
        worker=WorkerId("benchmark"),
        epoch=1,
        role=Role.DECODE,
        layout=engine.runner.pools[0].layout,
        num_blocks=engine.num_blocks,
        max_len=longest_sequence(engine),
        prefix_caching=False,
    )
    scheduler = ElasticScheduler(
        shared,
        prefill_tokens=512,
        prefill_seqs=32,
        decode_tokens=512,
        decode_seqs=64,
        speculation=speculation,
    )
    role = ElasticRole(scheduler, engine, layer_groups=1)
    answers: dict[str, list[int]] = {}

    def perform(actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, Tokens):
                answers.setdefault(str(action.message.attempt.request), []).extend(action.message.tokens)

    for index, tokens in enumerate(prompts):
        spec = RequestSpec(
            attempt=AttemptId(RequestId(f"r{index}"), 0),
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True),
            eos_token_ids=(),
            cache_salt=b"",
            arrival=0.0,
        )
        message = StartDecode(spec=spec, prefill_worker=None, lease_s=1e9)
        perform(scheduler.handle(FromCoordinator(_OWNER, message), 0.0))
    while len(answers) < len(prompts):
        role.step(lambda actions: perform(list(actions)))
    before, began = sum(map(len, answers.values())), time.perf_counter()
    while not scheduler.idle:
        role.step(lambda actions: perform(list(actions)))
    seconds = time.perf_counter() - began
    beat = scheduler.heartbeat()
    written = sum(map(len, answers.values())) - before
    ordered = [answers[f"r{index}"] for index in range(len(prompts))]
    return Outcome(written / seconds, sum(beat.proposed_at), sum(beat.accepted_at), ordered)


def guessing(engine: Engine, *, adaptive: bool) -> Speculation:
    drafter = PromptLookup(min_tokens=2, max_tokens=5)
    return Speculation(drafter, num_tokens=5, adaptive=adaptive, max_len=longest_sequence(engine))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default=store.DEFAULT_MODEL)
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    folder = store.resolve(arguments.model)
    engine = build_engine(folder, ModelSettings(), CacheSettings(), device="cpu", num_threads=1)
    tokenizer = Tokenizer.from_dir(folder)
    print("| prompt | streams | plain, tokens/s | adaptive | always | accepted (adaptive) | same tokens |")
    print("|---|---|---|---|---|---|---|")
    for name, streams in itertools.product(arguments.prompts, (1, 8)):
        chat = tokenizer.apply_chat_template([ChatMessage(role="user", content=PROMPTS[name])])
        prompts = [tokenizer.encode(chat, add_special_tokens=False)] * streams
        best: dict[str, Outcome] = {}
        for _ in range(arguments.rounds):
            for how in ("plain", "adaptive", "always"):
                speculation = None if how == "plain" else guessing(engine, adaptive=how == "adaptive")
                found = run(engine, prompts, speculation)
                if how not in best or found.tokens_per_s > best[how].tokens_per_s:
                    best[how] = found
        plain, adaptive, always = best["plain"], best["adaptive"], best["always"]
        share = f"{adaptive.accepted}/{adaptive.proposed}" if adaptive.proposed else "-"
        same = plain.answers == adaptive.answers == always.answers
        print(
            f"| {name} | {streams} | {plain.tokens_per_s:.1f} "
            f"| {adaptive.tokens_per_s:.1f} ({adaptive.tokens_per_s / plain.tokens_per_s:.2f}x) "
            f"| {always.tokens_per_s:.1f} ({always.tokens_per_s / plain.tokens_per_s:.2f}x) "
            f"| {share} | {'yes' if same else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
