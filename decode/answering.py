"""What is said of a sequence's tokens, and when they end it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from decode.run import DecodeRun
from pdserve.core.messages import FinishReason, KvArrived, PrefillDone, Tokens
from pdserve.core.sampling import TokenLogprobs
from pdserve.engine.batch import Sampled
from pdserve.worker.events import Action, Send
from pdserve.worker.finish import finish_reason


class Answering:
    def __init__(self, max_len: int) -> None:
        self._max_len = max_len

    def prompt_read(self, run: DecodeRun, sampled: Sampled) -> list[Action]:
        """What a prefill worker would have said. `sampled`: the first token, not appended yet."""
        wants_logprobs = run.num_prompt_logprobs is not None
        done = PrefillDone(
            attempt=run.attempt,
            token=sampled.token,
            logprobs=sampled.logprobs,
            prompt_logprobs=[None, *run.prompt_logprobs] if wants_logprobs else [],
            finish_reason=self._finish(run, sampled.token),
            compute_s=run.compute_s,
        )
        run.reading = False
        return [Send(run.owner, done), Send(run.owner, KvArrived(attempt=run.attempt))]

    def again(self, run: DecodeRun, tokens: list[int], logprobs: list[TokenLogprobs]) -> Send:
        """Tokens that came with a hand-over: the coordinator may not have heard them from who wrote them."""
        run.logprobs += logprobs
        return Send(
            run.owner,
            Tokens(
                attempt=run.attempt,
                first_index=run.spec.num_output_tokens,
                tokens=tokens,
                logprobs=logprobs,
            ),
        )

    def append(self, run: DecodeRun, sampled: Sequence[Sampled]) -> tuple[Send, FinishReason | None]:
        """Stream tokens, up to the one that ends the answer, if one does."""
        first_index, finish = run.num_output, None
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for one in sampled:
            finish = self._finish(run, one.token)
            tokens.append(one.token)
            run.tokens.append(one.token)
            if one.logprobs is not None:
                logprobs.append(one.logprobs)
            if finish is not None:
                break
        run.logprobs += logprobs
        message = Tokens(
            attempt=run.attempt,
            first_index=first_index,
            tokens=tokens,
            logprobs=logprobs,
            finish_reason=finish,
        )
        return Send(run.owner, message), finish

    def _finish(self, run: DecodeRun, token: int) -> FinishReason | None:
        return finish_reason(run.spec, token, num_tokens=len(run.tokens) + 1, max_len=self._max_len)
