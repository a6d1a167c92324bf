"""A worker of a simulated cluster: real schedulers, and a model that needs no arithmetic."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.core.ids import WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout
from pdserve.core.messages import Down, Role, Up, WorkerInfo
from pdserve.elastic.plan import StepPlan
from pdserve.elastic.scheduler import ElasticScheduler
from pdserve.engine.batch import Sampled
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import Event, OwnerId
from pdserve.worker.shared import Shared

MODEL = "simulated"
NOBODY = OwnerId(0)
BLOCK, LAYERS, EOS, MAX_LEN, NUM_BLOCKS = 4, 4, 2, 60, 26
LAYOUT = GroupLayout(
    group=CacheGroup(name="kv", num_layers=LAYERS, num_kv_heads=1, head_dim=2, dtype="float32"),
    block_tokens=BLOCK,
)
FINGERPRINT = Fingerprint(protocol=PROTOCOL_VERSION, model=MODEL, layouts=(LAYOUT,))


@dataclass(slots=True, eq=False)
class Process:
    """One incarnation of a worker."""

    info: WorkerInfo
    shared: Shared
    scheduler: ElasticScheduler
    owner: OwnerId = NOBODY
    linked: bool = False
    """The coordinator's connection to it stands."""
    stopped: bool = False
    """SIGSTOP: it does nothing, and what is sent to it waits."""
    down: deque[Down] = field(default_factory=deque)
    up: deque[Up] = field(default_factory=deque)
    inbox: deque[Event] = field(default_factory=deque)
    """From its transfer service."""
    peers: dict[WorkerId, Process] = field(default_factory=dict)
    """Whose memory its transfer service can reach: processes, which may have ended."""

    @property
    def id(self) -> WorkerId:
        return self.info.worker


def new_process(name: str, role: Role, epoch: int) -> Process:
    worker = WorkerId(name)
    shared = Shared(
        worker=worker,
        epoch=epoch,
        role=role,
        layout=LAYOUT,
        num_blocks=NUM_BLOCKS,
        max_len=MAX_LEN,
        prefix_caching=True,
    )
    scheduler = ElasticScheduler(shared, prefill_tokens=12, prefill_seqs=4, decode_tokens=12, decode_seqs=4)
    info = WorkerInfo(
        worker=worker,
        role=role,
        epoch=epoch,
        pid=1,
        host="simulated",
        fingerprint=FINGERPRINT,
        transfer_metadata=b"",
        num_blocks=NUM_BLOCKS,
        block_tokens=BLOCK,
        max_model_len=MAX_LEN,
        max_num_seqs=4,
    )
    return Process(info, shared, scheduler)


def next_token(tokens: Sequence[int], seed: int) -> int:
    """What the model says after `tokens`, drawn with `seed`."""
    mixed = seed
    for token in tokens:
        mixed = (mixed * 31 + token + 7) % 1_000_003
    return EOS if mixed % 61 == 0 else 3 + mixed % 6


def computed(plan: StepPlan) -> list[WorkResult]:
    """What a step of this model gives."""
    turns = [(turn.final, turn.run.tokens, turn.run.spec) for turn in plan.turns]
    chunks = [(chunk.final, chunk.run.spec.tokens, chunk.run.spec) for chunk in plan.chunks]
    return [
        WorkResult(Sampled(next_token(tokens, spec.sampling.seed), None) if final else None, [])
        for final, tokens, spec in turns + chunks
    ]
