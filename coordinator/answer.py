"""Text of a request's samples: outputs of the registry in, deltas of the public protocol out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from coordinator.events import Emit, EmitPrompt, End, NewRequest, Output
from coordinator.models import LoadedModel
from coordinator.wire import FINISH_REASONS, position_logprobs, prompt_logprobs, timings
from pdserve.core.errors import PdServeError
from pdserve.core.ids import RequestId
from pdserve.core.messages import FinishReason
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sampling import TokenLogprobs
from pdserve.text.detokenizer import IncrementalDetokenizer
from pdserve.text.stop import StopMatcher


@dataclass(slots=True)
class _Turn:
    """What one batch holds of one sample."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: EmitPrompt | None = None
    end: End | None = None


class RequestAnswer:
    """All samples of one request. Feed it every batch until `done`."""

    def __init__(self, samples: Sequence[NewRequest], model: LoadedModel, *, response_id: str) -> None:
        self._answers = {
            sample.id: SampleAnswer(sample, index, model, response_id=response_id)
            for index, sample in enumerate(samples)
        }
        self._prompt_tokens: Final = len(samples[0].tokens)
        self._cached_tokens = 0
        self._open = len(samples)

    @property
    def done(self) -> bool:
        return self._open == 0

    def read(self, batch: Sequence[Output]) -> tuple[list[pb.GenerateDelta], list[RequestId]]:
        """At most one delta per sample, and the samples in which a stop string has just matched.

        Raises the error that ended a sample: it ends the request.
        """
        deltas: list[pb.GenerateDelta] = []
        stopped: list[RequestId] = []
        for request, turn in _by_sample(batch).items():
            answer = self._answers[request]
            was_stopped = answer.matched is not None
            delta = answer.read(turn)
            if turn.end is not None:
                self._sample_ended(answer, turn.end, delta)
            elif answer.matched is not None and not was_stopped:
                stopped.append(request)
            if delta is not None:
                deltas.append(delta)
        return deltas, stopped

    def _sample_ended(self, answer: SampleAnswer, end: End, delta: pb.GenerateDelta | None) -> None:
        self._open -= 1
        if answer.index == 0:
            self._cached_tokens = end.report.cached_tokens
        if self.done and delta is not None:
            delta.usage.prompt_tokens = self._prompt_tokens
            delta.usage.completion_tokens = sum(a.num_tokens for a in self._answers.values())
            delta.usage.cached_prompt_tokens = self._cached_tokens


class SampleAnswer:
    """One sample: where its text is, and whether a stop string has ended it."""

    def __init__(self, request: NewRequest, index: int, model: LoadedModel, *, response_id: str) -> None:
        sampling = request.sampling
        self.index: Final = index
        self.num_tokens = 0
        self.matched: str | None = None
        self._request, self._response_id = request, response_id
        self._detokenizer = IncrementalDetokenizer(model.tokenizer, prompt_tokens=request.tokens)
        self._stop = StopMatcher(sampling.stop) if sampling.stop else None
        self._min_tokens = sampling.min_tokens
        ending = set(sampling.stop_token_ids)
        self._ending = ending if sampling.ignore_eos else ending | set(request.eos_token_ids)

    def read(self, turn: _Turn) -> pb.GenerateDelta | None:
        """None when there is nothing to say. Raises the error that ended the sample."""
        text, tokens = "", turn.tokens
        if self.matched is not None:
            tokens = []  # written before the worker heard of the stop
        elif tokens:
            text, kept = self._text_of(tokens)
            tokens = tokens[:kept]
            self.num_tokens += kept
        if turn.end is not None:
            if self.matched is None and isinstance(turn.end.outcome, PdServeError):
                raise turn.end.outcome
            text += self._rest()
        elif not tokens and turn.prompt is None:
            return None
        delta = pb.GenerateDelta(request_id=self._response_id, index=self.index, text=text, token_ids=tokens)
        if turn.logprobs:
            delta.logprobs.extend(map(position_logprobs, turn.logprobs[: len(tokens)]))
        if turn.prompt is not None:
            delta.prompt_logprobs.CopyFrom(prompt_logprobs(self._request.tokens, turn.prompt.logprobs))
        if turn.end is not None:
            self._close(delta, turn.end)
        return delta

    def _close(self, delta: pb.GenerateDelta, end: End) -> None:
        if self.matched is not None or isinstance(end.outcome, PdServeError):
            delta.finish_reason = FINISH_REASONS[FinishReason.STOP]
        else:
            delta.finish_reason = FINISH_REASONS[end.outcome]
        if self.matched is not None:
            delta.matched_stop = self.matched
        delta.timings.CopyFrom(timings(end.report))

    def _text_of(self, tokens: list[int]) -> tuple[str, int]:
        """Text that has become certain, and how many of the tokens count: those up to a stop string."""
        if self._stop is None:
            # The token that ends an answer counts, but is not shown.
            ends = self._ends(tokens[-1], self.num_tokens + len(tokens))
            return self._detokenizer.push(tokens[:-1] if ends else tokens), len(tokens)
        text = ""
        for count, token in enumerate(tokens, start=1):
            total = self.num_tokens + count
            new = "" if self._ends(token, total) else self._detokenizer.push([token])
            if total < self._min_tokens:
                text += new  # a stop string counts only in what comes after min_tokens
                continue
            result = self._stop.push(new)
            text += result.text_to_emit
            self.matched = result.matched
            if self.matched is not None:
                return text, count
        return text, len(tokens)

    def _ends(self, token: int, count: int) -> bool:
        return token in self._ending and count >= self._min_tokens

    def _rest(self) -> str:
        """What was held back, now that nothing follows."""
        if self.matched is not None:
            return ""
        rest = self._detokenizer.flush()
        return rest if self._stop is None else self._stop.push(rest).text_to_emit + self._stop.flush()


def _by_sample(batch: Sequence[Output]) -> dict[RequestId, _Turn]:
    turns: dict[RequestId, _Turn] = {}
    for output in batch:
        turn = turns.get(output.request)
        if turn is None:
            turn = turns[output.request] = _Turn()
        match output:
            case Emit(tokens=tokens, logprobs=logprobs):
                turn.tokens += tokens
                turn.logprobs += logprobs
            case EmitPrompt():
                turn.prompt = output
            case End():
                turn.end = output
    return turns
