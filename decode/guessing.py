"""Speculative decoding as the configuration asks for it."""

from __future__ import annotations

from typing import assert_never

from decode.draft_model import DraftModel
from decode.drafting import Drafter, PromptLookup
from decode.speculation import Speculation
from pdserve.core.speculative_settings import SpeculativeMethod
from pdserve.worker.ports import EnginePort
from pdserve.worker.running import load_draft_engine, longest_sequence
from pdserve.worker.spec import WorkerSpec


def make_speculation(
    spec: WorkerSpec, engine: EnginePort, draft_engine: EnginePort | None
) -> Speculation | None:
    """As `speculative` in the configuration says. Loads the draft model unless given its engine.

    A prefill worker that stays one has no draft model: it writes few answers, if any.
    """
    settings = spec.config.speculative
    drafter: Drafter
    match settings.method:
        case SpeculativeMethod.OFF:
            return None
        case SpeculativeMethod.NGRAM:
            drafter = PromptLookup(
                min_tokens=settings.prompt_lookup_min, max_tokens=settings.prompt_lookup_max
            )
        case SpeculativeMethod.DRAFT_MODEL if not spec.comes_to_decode:
            return None
        case SpeculativeMethod.DRAFT_MODEL:
            drafter = DraftModel(
                draft_engine or load_draft_engine(spec),
                vocab_size=engine.sampler.vocab_size,
                max_num_batched_tokens=spec.config.decode.max_num_batched_tokens,
            )
        case _:
            assert_never(settings.method)
    return Speculation(
        drafter,
        num_tokens=settings.num_speculative_tokens,
        adaptive=settings.adaptive,
        max_len=longest_sequence(engine),
    )
