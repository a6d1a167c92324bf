"""Text from tokens: stop strings, held-back text, deltas that hold whole batches."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.answer import RequestAnswer
from coordinator.events import Emit, EmitPrompt, End, NewRequest
from coordinator.models import LoadedModel, ServedModel
from coordinator.report import Report
from pdserve.core.errors import PdServeError, WorkerLost
from pdserve.core.ids import RequestId
from pdserve.core.messages import FinishReason
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sampling import SamplingParams, TokenLogprobs
from tests.support.registry_world import new_request
from tests.support.scripted_model import make_scripted_model

RID = RequestId("r")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_scripted_model(tmp_path_factory.mktemp("model"))
    return LoadedModel.load(ServedModel.from_dir(folder))


def request(**sampling: object) -> NewRequest:
    return new_request("r", sampling=SamplingParams(seed=1, **sampling))  # type: ignore[arg-type]


def emit(text: str | bytes, name: RequestId = RID) -> Emit:
    data = text.encode() if isinstance(text, str) else text
    return Emit(request=name, tokens=list(data), logprobs=[], gap_s=None)


def end(outcome: FinishReason | PdServeError = FinishReason.LENGTH, name: RequestId = RID) -> End:
    report = Report(
        id=name,
        model="m",
        tenant="",
        priority=0,
        prompt_tokens=3,
        output_tokens=0,
        attempts=1,
        e2e_s=1.0,
        queue_s=0.0,
        cached_tokens=2,
    )
    return End(request=name, outcome=outcome, report=report)


def one(sample: NewRequest, model: LoadedModel) -> RequestAnswer:
    return RequestAnswer([sample], model, response_id="r")


def test_one_batch_is_one_delta_with_its_end_and_usage(model: LoadedModel) -> None:
    answer = one(request(), model)
    (delta,), stopped = answer.read([emit("ab"), emit("c"), end()])
    assert (delta.text, list(delta.token_ids)) == ("abc", [97, 98, 99])
    assert delta.finish_reason == pb.FINISH_REASON_LENGTH
    assert (delta.usage.prompt_tokens, delta.usage.completion_tokens) == (3, 3)
    assert delta.usage.cached_prompt_tokens == 2
    assert stopped == []
    assert answer.done


def test_half_a_character_waits_for_its_other_half(model: LoadedModel) -> None:
    answer = one(request(), model)
    (first,), _ = answer.read([emit("é".encode()[:1])])
    assert (first.text, len(first.token_ids)) == ("", 1)
    (second,), _ = answer.read([emit("é".encode()[1:])])
    assert second.text == "é"


def test_text_that_may_become_a_stop_string_is_held_back(model: LoadedModel) -> None:
    answer = one(request(stop=("END",)), model)
    texts = [answer.read([emit(part)])[0][0].text for part in ("aE", "N", "b")]
    assert texts == ["a", "", "ENb"]
    assert answer.read([emit("E"), end()])[0][0].text == "E"


def test_a_stop_string_cuts_text_and_tokens_and_is_reported_once(model: LoadedModel) -> None:
    answer = one(request(stop=("END",)), model)
    (delta,), stopped = answer.read([emit("abENDcd")])
    assert (delta.text, list(delta.token_ids), delta.finish_reason) == ("ab", list(b"abEND"), 0)
    assert stopped == [RID]
    assert answer.read([emit("more")]) == ([], [])
    (last,), stopped = answer.read([end(FinishReason.STOP)])
    assert stopped == []
    assert (last.text, last.finish_reason, last.matched_stop) == ("", pb.FINISH_REASON_STOP, "END")
    assert last.usage.completion_tokens == 5


def test_a_stop_string_outweighs_whatever_ended_the_sample_meanwhile(model: LoadedModel) -> None:
    for outcome in (FinishReason.LENGTH, WorkerLost("w", "gone")):
        answer = one(request(stop=("END",)), model)
        (delta,), _ = answer.read([emit("aEND"), end(outcome)])
        assert (delta.text, delta.finish_reason) == ("a", pb.FINISH_REASON_STOP)


def test_a_stop_string_within_min_tokens_is_text(model: LoadedModel) -> None:
    answer = one(request(stop=("END",), min_tokens=4, max_tokens=9), model)
    (delta,), stopped = answer.read([emit("ENDaENDb")])
    assert delta.text == "ENDa"
    assert stopped == [RID]


def test_the_end_of_sequence_token_is_counted_and_not_shown(model: LoadedModel) -> None:
    answer = one(request(), model)
    (delta,), _ = answer.read([emit(b"hi\x00"), end(FinishReason.STOP)])
    assert (delta.text, delta.usage.completion_tokens) == ("hi", 3)
    assert delta.finish_reason == pb.FINISH_REASON_STOP


def test_an_error_ends_the_request(model: LoadedModel) -> None:
    answer = one(request(), model)
    with pytest.raises(WorkerLost):
        answer.read([emit("a"), end(WorkerLost("w", "gone"))])


def test_prompt_logprobs_and_logprobs_ride_along(model: LoadedModel) -> None:
    sample = request(logprobs=1)
    answer = one(sample, model)
    known = TokenLogprobs(97, -0.5, ((97, -0.5),))
    prompt = EmitPrompt(request=RID, logprobs=[None, TokenLogprobs(2, -1.0), TokenLogprobs(3, -2.0)])
    (delta,), _ = answer.read([prompt, Emit(request=RID, tokens=[97], logprobs=[known], gap_s=None)])
    assert [p.token_id for p in delta.prompt_logprobs.positions] == [1, 2, 3]
    assert [(p.token_id, p.logprob, p.top[0].token_id) for p in delta.logprobs] == [(97, -0.5, 97)]


def test_usage_comes_with_the_last_sample_that_ends(model: LoadedModel) -> None:
    samples = [new_request(f"r.{i}", sampling=SamplingParams(seed=1)) for i in range(2)]
    answer = RequestAnswer(samples, model, response_id="r")
    ids = [sample.id for sample in samples]
    (first,), _ = answer.read([emit("abc", ids[1]), end(name=ids[1])])
    assert (first.index, first.HasField("usage")) == (1, False)
    (second,), _ = answer.read([emit("de", ids[0]), end(name=ids[0])])
    assert second.usage.completion_tokens == 5


@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 160), max_size=6))
def test_the_deltas_joined_are_the_text_however_the_batches_are_cut(
    model: LoadedModel, text: str, cuts: list[int]
) -> None:
    data = text.replace("\x00", "").encode()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    answer = one(request(stop=("\uffff never",)), model)
    said = ""
    for start, stop in itertools.pairwise(bounds):
        if start != stop:
            said += "".join(delta.text for delta in answer.read([emit(data[start:stop])])[0])
    said += answer.read([end()])[0][0].text
    assert said == data.decode()
