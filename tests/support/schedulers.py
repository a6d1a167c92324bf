"""Schedulers of workers for tests: small, pure, over a pool without memory behind it."""

from __future__ import annotations

from decode.speculation import Speculation
from pdserve.core.ids import WorkerId
from pdserve.core.layout import GroupLayout
from pdserve.core.messages import Role
from pdserve.elastic.scheduler import ElasticScheduler
from pdserve.worker.shared import Shared


def make_scheduler(
    role: Role,
    *,
    layout: GroupLayout,
    worker: str | None = None,
    num_blocks: int = 32,
    max_len: int = 100,
    max_num_seqs: int = 8,
    budget: int = 16,
    prefix_caching: bool = True,
    speculation: Speculation | None = None,
    gather: int | None = None,
) -> ElasticScheduler:
    """budget: tokens of a step, whatever is in it. gather: of prompts, from which on no more are added."""
    shared = Shared(
        worker=WorkerId(worker or f"{role.value}-0"),
        epoch=1,
        role=role,
        layout=layout,
        num_blocks=num_blocks,
        max_len=max_len,
        prefix_caching=prefix_caching,
        gather_tokens=gather,
    )
    return ElasticScheduler(
        shared,
        prefill_tokens=budget,
        prefill_seqs=max_num_seqs,
        decode_tokens=budget,
        decode_seqs=max_num_seqs,
        speculation=speculation,
    )
