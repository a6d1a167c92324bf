"""A sequence as a decode scheduler has it, for tests of its parts."""

from __future__ import annotations

from decode.run import DecodeRun, Stage
from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.messages import RequestSpec
from pdserve.core.sampling import SamplingParams
from pdserve.engine.prefix_cache import PrefixHashes
from pdserve.worker.events import OwnerId
from pdserve.worker.urgency import decode_urgency


def run_of(tokens: list[int], name: str = "r", max_tokens: int = 100) -> DecodeRun:
    spec = RequestSpec(
        attempt=AttemptId(RequestId(name), 0),
        tokens=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        eos_token_ids=(),
        cache_salt=b"",
        arrival=0.0,
    )
    return DecodeRun(
        owner=OwnerId(1),
        spec=spec,
        urgency=decode_urgency(spec, 0),
        source=None,
        received=0.0,
        lease_until=0.0,
        stage=Stage.RUNNING,
        hashes=PrefixHashes(b"", 4),
        tokens=list(tokens),
        computed=len(tokens) - 1,
    )
