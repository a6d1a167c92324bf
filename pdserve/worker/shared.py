"""What both roles of one worker have in common: one pool, one prefix cache, one table of peers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from pdserve.core.ids import WorkerId
from pdserve.core.layout import GroupLayout
from pdserve.core.messages import Role
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.prefix_cache import PrefixCache
from pdserve.engine.tiers.store import TierPort
from pdserve.worker.duty import Duty
from pdserve.worker.peers import PeerTable
from pdserve.worker.tiering import Tiering


class Shared:
    """Made once per worker, and given to the schedulers of both roles."""

    def __init__(
        self,
        *,
        worker: WorkerId,
        epoch: int,
        role: Role,
        layout: GroupLayout,
        num_blocks: int,
        max_len: int,
        prefix_caching: bool,
        tiers: TierPort | None = None,
        gather_tokens: int | None = None,
    ) -> None:
        """max_len: tokens of the longest sequence that fits.

        gather_tokens: a step that reads so many takes no further prompt in: it would not read them faster,
        and the first ones would wait for the last. None: as many prompts as its budget allows.
        """
        self.worker, self.epoch, self.layout, self.max_len = worker, epoch, layout, max_len
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, block_tokens=layout.block_tokens, enabled=prefix_caching)
        self.tiering = Tiering(self.pool, self.cache, tiers, block_tokens=layout.block_tokens)
        self.peers = PeerTable()
        self.duty = Duty(role)
        self.gather_tokens = gather_tokens
        self.push_ids: Iterator[int] = itertools.count()
        """Of the worker: who hears of a push's end knows whose it was."""
