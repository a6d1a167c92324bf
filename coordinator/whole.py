"""A unary answer, put together from the deltas of a streamed one."""

from __future__ import annotations

from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb


class WholeAnswer:
    def __init__(self) -> None:
        self._response = pb.GenerateResponse()
        self._choices: dict[int, pb.Choice] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, delta: pb.GenerateDelta) -> None:
        response = self._response
        choice = self._choices.setdefault(delta.index, pb.Choice(index=delta.index))
        self._texts.setdefault(delta.index, []).append(delta.text)
        response.request_id = delta.request_id
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(delta.logprobs)
        if delta.HasField("prompt_logprobs"):
            response.prompt_logprobs.CopyFrom(delta.prompt_logprobs)
        if delta.HasField("timings"):
            choice.finish_reason = delta.finish_reason
            choice.timings.CopyFrom(delta.timings)
        if delta.HasField("matched_stop"):
            choice.matched_stop = delta.matched_stop
        if delta.HasField("usage"):
            response.usage.CopyFrom(delta.usage)

    def response(self, *, model: str) -> pb.GenerateResponse:
        """After the last delta."""
        self._response.model = model
        for index, choice in sorted(self._choices.items()):
            choice.text = "".join(self._texts[index])
            self._response.choices.append(choice)
        return self._response
