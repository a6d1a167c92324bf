"""Workers of several ranks in this process: each has threads, an engine, a pool and a backend of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvtransfer.local import LocalHub
from pdserve.core.config import CacheSettings, DType, ModelSettings, ServeConfig
from pdserve.core.messages import Role
from pdserve.elastic.worker import start_worker
from pdserve.engine.build import Engine, build_engine
from pdserve.models.ranks import Ranks
from pdserve.worker.ports import BackendFactory
from pdserve.worker.ranks.follower import Follower
from pdserve.worker.ranks.leader import Leader, leading
from pdserve.worker.ranks.names import RankSpec
from pdserve.worker.running import RunningWorker, pool_regions
from tests.support.workers import Pair, config_of, local_backends, spec_of

START_S = 60.0
BLOCK = 8


def build(folder: Path, ranks: Ranks | None, num_blocks: int = 64) -> Engine:
    return build_engine(
        folder,
        ModelSettings(dtype=DType.FLOAT32),
        CacheSettings(block_size=BLOCK, num_blocks=num_blocks),
        device="cpu",
        num_threads=1,
        ranks=ranks,
    )


@dataclass
class Team:
    """A worker and its followers."""

    worker: RunningWorker
    engines: list[Engine]
    followers: list[Follower] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    ends: list[BaseException | None] = field(default_factory=list)
    """How each follower ended."""

    def stop(self) -> None:
        self.worker.stop()
        for thread in self.threads:
            thread.join(START_S)
            assert not thread.is_alive()


def start_team(
    role: Role,
    size: int,
    sockets: Path,
    model: Path,
    backends: BackendFactory,
    config: ServeConfig | None = None,
    silence_s: float = 30.0,
) -> Team:
    spec = replace(spec_of(role, sockets, config or config_of()), profile_s=5.0)
    if size == 1:
        alone = build(model, None)
        return Team(start_worker(spec, engine=alone, backend_factory=backends), [alone])
    at = RankSpec(rank=0, size=size, meeting=sockets / f"{spec.worker}.ranks")
    followers: dict[int, Follower] = {}
    engines: dict[int, Engine] = {}
    ends: list[BaseException | None] = [None] * (size - 1)

    def follow(rank: int) -> None:
        try:
            follower = followers[rank] = Follower(spec, replace(at, rank=rank))
            engine = engines[rank] = build(model, follower.ranks)
            follower.run(engine, backends, pool_regions)
        except BaseException as error:  # the test looks at it
            ends[rank - 1] = error

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    leader = Leader(spec.worker, at, device="cpu", start_timeout_s=START_S, silence_s=silence_s)
    engines[0] = build(model, leader.ranks)
    worker = start_worker(spec, engine=leading(engines[0], leader), backend_factory=backends, leader=leader)
    return Team(
        worker, [engines[r] for r in range(size)], [followers[r] for r in range(1, size)], threads, ends
    )


@contextmanager
def pair_of_teams(
    sockets: Path, model: Path, prefill: int, decode: int, backends: BackendFactory | None = None
) -> Iterator[tuple[Pair, Team, Team]]:
    """A prefill and a decode worker of so many ranks."""
    backends = backends or local_backends(LocalHub())
    with ExitStack() as undo:
        first = start_team(Role.PREFILL, prefill, sockets, model, backends)
        undo.callback(first.stop)
        second = start_team(Role.DECODE, decode, sockets, model, backends)
        undo.callback(second.stop)
        yield Pair(first.worker, second.worker), first, second
    first.worker.wait()
    second.worker.wait()
    assert [end for team in (first, second) for end in team.ends if end is not None] == []
