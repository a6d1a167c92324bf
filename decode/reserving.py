"""Who is let in, and the blocks it gets. Pure."""

from __future__ import annotations

import itertools

from decode.batch import Batch
from decode.run import DecodeRun, Source, Stage
from pdserve.core.layout import blocks_for
from pdserve.core.messages import RefusalReason, RequestSpec, Role, StartDecode
from pdserve.engine.prefix_cache import PrefixHashes
from pdserve.worker.events import OwnerId
from pdserve.worker.shared import Shared
from pdserve.worker.urgency import decode_urgency


class Reserving:
    """Makes runs of `StartDecode`, or says why not."""

    def __init__(self, shared: Shared, batch: Batch, *, max_num_seqs: int) -> None:
        self._shared, self._batch = shared, batch
        self._block_tokens = shared.layout.block_tokens
        # Some arrive while the batch is full, so that a seat is taken again in the next step.
        self._max_runs = max_num_seqs + max(1, max_num_seqs // 4)
        self._order = itertools.count()

    def refusal(self, message: StartDecode, num_runs: int) -> tuple[RefusalReason, str] | None:
        """Before any block is looked for."""
        num_tokens, peer, max_len = len(message.spec.tokens), message.prefill_worker, self._shared.max_len
        duty, worker = self._shared.duty, self._shared.worker
        if duty.draining:
            return RefusalReason.DRAINING, f"worker {worker} is draining"
        if peer is not None and duty.role is not Role.DECODE:
            return RefusalReason.WRONG_ROLE, f"worker {worker} is in the {duty.role} role"
        if not 1 <= num_tokens < max_len:
            limit = f"1 to {max_len - 1}, as this worker holds {max_len} with the answer"
            return RefusalReason.TOO_LONG, f"{num_tokens} tokens, must be {limit}"
        if peer is not None and self._shared.peers.epoch(peer) is None:
            return RefusalReason.UNKNOWN_PEER, f"prefill worker {peer} is not connected"
        if num_runs >= self._max_runs:
            return RefusalReason.BATCH_FULL, f"{num_runs} requests are here"
        if self._batch.num_preempted:
            waiting = self._batch.num_preempted
            return RefusalReason.NO_BLOCKS, f"{waiting} preempted requests wait for blocks first"
        return None

    def new_run(self, owner: OwnerId, message: StartDecode, now: float) -> DecodeRun:
        spec, peer = message.spec, message.prefill_worker
        epoch = None if peer is None else self._shared.peers.epoch(peer)
        return DecodeRun(
            owner=owner,
            spec=spec,
            urgency=decode_urgency(spec, next(self._order)),
            source=None if peer is None or epoch is None else Source(peer, epoch),
            received=now,
            lease_until=now + message.lease_s,
            ahead=self._ahead(spec, message.ahead_tokens),
            stage=Stage.RUNNING if peer is None else Stage.RECEIVING,
            hashes=PrefixHashes(spec.cache_salt, self._block_tokens),
            tokens=list(spec.tokens),
            reading=peer is None,
        )

    def reserve(self, run: DecodeRun) -> bool:
        """Blocks for its tokens and some of the next, if there are enough; a remote writer gets those that
        the cache does not have."""
        num_tokens, size = len(run.tokens), self._block_tokens
        ahead = max(run.ahead, self._ahead(run.spec, size))
        read_all = run.num_prompt_logprobs is not None
        taken = self._shared.cache.reserve(
            [] if read_all else run.hashes.of(run.tokens),
            num_tokens,
            total=blocks_for(num_tokens + ahead, size),
            spare=self._batch.spare_blocks,
            cached_holder=run.computing,
            fresh_holder=run.computing if run.source is None else run.receiving,
        )
        if taken is None:
            return False
        run.blocks = [*taken.cached, *taken.fresh]
        run.remembered = len(taken.cached)
        run.computed = run.remembered * size
        return True

    def _ahead(self, spec: RequestSpec, wanted: int) -> int:
        """Up to `wanted` tokens more, as far as the answer can get so long."""
        left = max(spec.sampling.max_tokens - spec.num_output_tokens, 0)
        return max(min(wanted, left, self._shared.max_len - len(spec.tokens)), 0)
