"""Which attempts may still have writes in flight, and which decode worker must hear when they cannot.

    StartPrefill sent --> open --(TransferDone | PushesSettled from P | P's process gone)--> forgotten
                            '--(attempt ended early)--> owed: the end is relayed to D as PushesSettled

An attempt outlives its request here: D keeps the blocks of an attempt that ended early quarantined until it
hears that no write can land in them any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.events import Action, Send
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import PushesSettled


@dataclass(slots=True)
class _Open:
    prefill: WorkerId
    decode: WorkerId
    decode_epoch: int
    prefix_of: str | None = None
    """A cached prefix that moves by itself, of this model; None: a request's KV."""
    owed: bool = False


class PushLedger:
    def __init__(self) -> None:
        self._open: dict[AttemptId, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def opened(
        self,
        attempt: AttemptId,
        prefill: WorkerId,
        decode: WorkerId,
        decode_epoch: int,
        *,
        prefix_of: str | None = None,
    ) -> None:
        self._open[attempt] = _Open(prefill, decode, decode_epoch, prefix_of)

    def prefix_target(self, attempt: AttemptId, by: WorkerId) -> tuple[str, WorkerId] | None:
        """Model of a prefix that `by` is pushing, and to whom; None for anything else."""
        entry = self._open.get(attempt)
        if entry is None or entry.prefix_of is None or entry.prefill != by:
            return None
        return entry.prefix_of, entry.decode

    def is_open(self, attempt: AttemptId) -> bool:
        return attempt in self._open

    def ended_early(self, attempt: AttemptId) -> None:
        """The decode worker gave up on it: it is owed a `PushesSettled`."""
        if attempt in self._open:
            self._open[attempt].owed = True

    def of_writer(self, writer: WorkerId) -> list[AttemptId]:
        """Attempts that await its last word."""
        return [attempt for attempt, entry in self._open.items() if entry.prefill == writer]

    def settled(
        self, attempt: AttemptId, by: WorkerId, epoch_of: Callable[[WorkerId], int | None]
    ) -> list[Action]:
        """The prefill worker says so. `epoch_of`: a worker's, None while it cannot be talked to."""
        entry = self._open.get(attempt)
        if entry is None or entry.prefill != by:
            return []
        del self._open[attempt]
        if entry.owed and epoch_of(entry.decode) == entry.decode_epoch:
            return [Send(worker=entry.decode, message=PushesSettled(attempt=attempt))]
        return []

    def worker_gone(self, worker: WorkerId) -> None:
        """Nothing of it writes any more, and decode workers hear that as `DropPeer`; a decode worker that is
        gone is owed nothing."""
        self._open = {a: e for a, e in self._open.items() if worker not in (e.prefill, e.decode)}
