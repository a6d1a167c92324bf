"""Runs `transformers.generate` for the benchmark: requests and events are JSON lines on stdin and stdout.

Started with the peers' own interpreter: `python generate_driver.py MODEL_DIR`. A request is
`{"prompts": [[ids]], "output_tokens": n}`, prompts of one length. Events: `{"event": "ready"}` once, then for
each request `{"event": "token"}` per step (single prompts only: transformers streams no batches) and
`{"event": "done", "prompt_tokens": p, "output_tokens": n}` with counts per prompt.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


def emit(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


class TokenEvents(BaseStreamer):
    """Says each generated token; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            emit(event="token")
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back, so there is nothing to flush."""


def main() -> None:
    # Any: transformers annotates `generate` and `eval` in ways that their own use does not pass.
    model: Any = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    model.eval()
    config = model.generation_config
    config.eos_token_id, config.pad_token_id = None, 0  # no token ends an answer early
    emit(event="ready")
    for line in sys.stdin:
        request = json.loads(line)
        ids_BL = torch.tensor(request["prompts"], dtype=torch.long)
        with torch.inference_mode():
            output_BL = model.generate(
                ids_BL,
                attention_mask=torch.ones_like(ids_BL),
                max_new_tokens=request["output_tokens"],
                do_sample=False,
                streamer=TokenEvents() if len(ids_BL) == 1 else None,
            )
        prompt_tokens = ids_BL.shape[1]
        emit(event="done", prompt_tokens=prompt_tokens, output_tokens=output_BL.shape[1] - prompt_tokens)


if __name__ == "__main__":
    main()
