"""Sends a workload on time and writes down what happens.

Every arrival is a task that sleeps until its own moment and then asks, whatever the others wait for. Latency
is counted from that moment: a server (or a client) that stalls delays everything that was due meanwhile, and
the figures show it. Measuring from the real sending would leave out what it held back: coordinated omission.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pdserve.bench.asks import Ask, Driver, Role, Said
from pdserve.bench.records import RequestRecord, Trial
from pdserve.bench.workload import Session, Workload
from pdserve.core.errors import PdServeError

LEAD_S: Final = 0.05
"""Between making the tasks and the first arrival."""


@dataclass(slots=True)
class Progress:
    """How far a trial is; for the display."""

    num_sent: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_met: int = 0


Watch = Callable[[Progress], None]


def _ignore(_: Progress) -> None:
    return None


async def run_trial(
    driver: Driver,
    workload: Workload,
    *,
    system: str,
    rate: float,
    round: int,
    drain_s: float,
    started_s: float = 0.0,
    watch: Watch = _ignore,
) -> Trial:
    """Send all of it, wait at most `drain_s` after the last arrival is due, cut the rest."""
    loop = asyncio.get_running_loop()
    player = _Player(driver, system, rate, round, loop.time() + LEAD_S, watch)
    tasks = [asyncio.create_task(player.play(session)) for session in workload.sessions]
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=LEAD_S + workload.duration_s + drain_s)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome
    counted = [record for record in player.records if not record.warmup]
    first_s = min((record.intended_s for record in counted), default=0.0)
    last_s = max((record.done_s or 0.0 for record in counted), default=0.0)
    return Trial(
        system=system,
        rate=rate,
        round=round,
        records=player.records,
        wall_s=max(last_s, workload.duration_s) - first_s if counted else 0.0,
        num_clipped=workload.num_clipped,
        started_s=started_s,
    )


class _Player:
    def __init__(
        self, driver: Driver, system: str, rate: float, round: int, zero: float, watch: Watch
    ) -> None:
        self._driver, self._system, self._rate, self._round = driver, system, rate, round
        self._zero, self._watch = zero, watch
        self._clock = asyncio.get_running_loop().time
        self._progress = Progress()
        self.records: list[RequestRecord] = []

    async def play(self, session: Session) -> None:
        said: list[Said] = []
        intended_s = session.at_s
        for number, turn in enumerate(session.turns):
            said = [*said, Said(role=Role.USER, token_ids=turn.new_tokens)]
            record = RequestRecord(
                system=self._system,
                rate=self._rate,
                round=self._round,
                session=session.index,
                turn=number,
                class_name=session.class_name,
                slo=session.slo,
                warmup=session.warmup,
                intended_s=intended_s,
                asked_output_tokens=turn.output_tokens,
            )
            self.records.append(record)
            await self._sleep_until(intended_s, record)
            answer = await self._ask(
                record, Ask(turns=said, output_tokens=turn.output_tokens, priority=session.priority)
            )
            if not record.ok or record.done_s is None or number + 1 == len(session.turns):
                return
            said.append(answer)
            intended_s = record.done_s + session.turns[number + 1].think_s

    async def _sleep_until(self, intended_s: float, record: RequestRecord) -> None:
        try:
            await asyncio.sleep(max(0.0, self._zero + intended_s - self._clock()))
        except asyncio.CancelledError:
            if record.turn > 0:
                self.records.remove(record)  # it was never due within the trial
            else:
                record.error = "cut"
            raise

    async def _ask(self, record: RequestRecord, ask: Ask) -> Said:
        """Fills in `record`; returns what the model said."""
        progress, ids, texts = self._progress, list[int](), list[str]()
        num_asked = sum(len(said.token_ids) for said in ask.turns)
        record.sent_s = self._now()
        progress.num_sent += 1
        self._watch(progress)
        try:
            async with contextlib.aclosing(self._driver.stream(ask)) as pieces:
                async for piece in pieces:
                    if piece.num_tokens:
                        record.token_times_s.append(self._now())
                        record.token_counts.append(piece.num_tokens)
                        ids += piece.token_ids
                        texts.append(piece.text)
                    if piece.timings is not None:
                        record.timings = piece.timings
                    if piece.done:
                        record.done_s = self._now()
                        record.prompt_tokens = piece.prompt_tokens or num_asked
                        record.cached_tokens = piece.cached_tokens
                        record.output_tokens = piece.output_tokens or sum(record.token_counts)
        except asyncio.CancelledError:
            record.error = "cut"
            raise
        except PdServeError as error:
            record.error, record.error_text = type(error).__name__, str(error)
        if record.error is None and not record.token_times_s:
            record.error, record.error_text = "EmptyAnswer", "the stream ended without a token"
        if not record.ok:
            record.output_tokens = sum(record.token_counts)
        progress.num_done += 1
        progress.num_failed += not record.ok
        progress.num_met += record.met
        self._watch(progress)
        # As much of what was asked stands in where the server does not tell its tokens.
        stand_in = ask.turns[0].token_ids[: record.output_tokens]
        return Said(role=Role.ASSISTANT, token_ids=tuple(ids) or stand_in, text="".join(texts))

    def _now(self) -> float:
        return self._clock() - self._zero
