from __future__ import annotations

import pytest

from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.messages import FinishReason, RequestSpec
from pdserve.core.sampling import SamplingParams
from pdserve.worker.finish import finish_reason

EOS, STOP, OTHER = 2, 50, 9


def reason(token: int, num_output: int, *, earlier: int = 0, max_len: int = 1000, **params: object) -> object:
    """Of an answer whose `num_output`th token is `token`; `earlier` ones came from an attempt before."""
    spec = RequestSpec(
        attempt=AttemptId(RequestId("r"), 0),
        tokens=[0] * (10 + earlier),
        num_prompt_tokens=10,
        sampling=SamplingParams(stop_token_ids=(STOP,), **params),  # type: ignore[arg-type]
        eos_token_ids=(EOS,),
        cache_salt=b"",
        arrival=0.0,
    )
    return finish_reason(spec, token, num_tokens=10 + num_output, max_len=max_len)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (reason(OTHER, 1), None),
        (reason(EOS, 1), FinishReason.STOP),
        (reason(STOP, 1), FinishReason.STOP),
        (reason(EOS, 1, ignore_eos=True), None),
        (reason(STOP, 1, ignore_eos=True), FinishReason.STOP),
        (reason(OTHER, 4, max_tokens=4), FinishReason.LENGTH),
        (reason(OTHER, 3, max_tokens=4), None),
        (reason(OTHER, 4, earlier=3, max_tokens=4), FinishReason.LENGTH),
        (reason(EOS, 4, max_tokens=4), FinishReason.STOP),
        (reason(EOS, 2, min_tokens=2), None),
        (reason(EOS, 3, min_tokens=2), FinishReason.STOP),
        (reason(OTHER, 5, max_len=15), FinishReason.LENGTH),
        (reason(OTHER, 4, max_len=15), None),
    ],
)
def test_an_answer_ends_at_a_stop_token_its_limit_or_the_contexts_end(
    found: object, expected: object
) -> None:
    assert found is expected
