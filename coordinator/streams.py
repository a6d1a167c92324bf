"""From the registry to one RPC: outputs of all samples of a request, in order, taken in batches."""

from __future__ import annotations

import asyncio

from coordinator.events import NewRequest, Output


class RequestStream:
    """Fed by the dispatcher, read by one RPC handler, both on the same event loop.

    A reader that is slower than the workers finds more in each batch; nothing queues up per token.
    """

    def __init__(self, samples: tuple[NewRequest, ...]) -> None:
        self.samples = samples
        self._batch: list[Output] = []
        self._reader: asyncio.Future[None] | None = None

    def feed(self, output: Output) -> None:
        self._batch.append(output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[Output]:
        """Everything since the last call; waits until there is something."""
        if not self._batch:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        batch, self._batch = self._batch, []
        return batch
