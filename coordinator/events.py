"""What happens to the registry, and what it wants done. Plain data; the service performs the actions."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.report import Report
from pdserve.core.errors import PdServeError
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import Down, FinishReason, Role, Up, WorkerInfo
from pdserve.core.sampling import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """One sample of one request, validated and tokenised."""

    id: RequestId
    model: str
    tokens: list[int]
    sampling: SamplingParams
    """With its seed."""
    eos_token_ids: tuple[int, ...]
    cache_salt: bytes
    arrival: float
    """Wall clock, seconds."""
    arrived: float
    deadline: float
    """Both on the registry's clock, seconds."""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    priority: int = 0
    preemptible: bool = False
    """May be interrupted, and go on later, to make room for a more urgent request."""
    queue_ttl_s: float | None = None
    """Refused when it has waited this long without having begun. None: as configured."""
    sla_class: str = ""
    tenant: str = ""
    traceparent: str = ""
    """W3C trace context of the call, as the client sent it."""
    first_epoch: int = 0
    """Epoch of the first attempt. A request that reuses an id starts above every epoch the id ever had."""


# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """The samples of one prompt. The first leads: the others follow it to its workers and prefix caches."""

    samples: tuple[NewRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FromWorker:
    worker: WorkerId
    epoch: int
    message: Up


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    info: WorkerInfo
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDown:
    """Silent or disconnected: nothing more is sent there. Its process may still live, and may still write."""

    worker: WorkerId
    epoch: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGone:
    """Its process has ended for certain: nothing of it can write into another worker any more."""

    worker: WorkerId
    epoch: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainWorker:
    """An operator wants it empty: nothing new goes there, and what a decode worker runs moves elsewhere."""

    worker: WorkerId
    timeout_s: float | None
    """After this long, what could not move starts over elsewhere. None: as configured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UndrainWorker:
    """An operator wants it used again."""

    worker: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeWorkerRole:
    """A worker shall take up another role, once it is empty of what it does now. See `coordinator.roles`."""

    worker: WorkerId
    role: Role
    timeout_s: float | None = None
    """As of `DrainWorker`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCancelled:
    request: RequestId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMatched:
    """The gateway found a stop string in the text: the request is finished, its worker does not know yet."""

    request: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Handling another event of this request raised: our own bug. The request fails, the others go on."""

    request: RequestId
    error: PdServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed: deadlines, leases, waits."""


Event = (
    Submit
    | FromWorker
    | WorkerJoined
    | WorkerDown
    | WorkerGone
    | DrainWorker
    | ChangeWorkerRole
    | UndrainWorker
    | ClientCancelled
    | StopMatched
    | Broken
    | Tick
)

# --- actions ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    worker: WorkerId
    message: Down


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """New output of a sample, in order and without repeats over all attempts."""

    request: RequestId
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    """Empty, or one per token."""
    gap_s: float | None
    """Since the sample's previous output; None on the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitPrompt:
    """Log-probabilities of the prompt, once, when asked for."""

    request: RequestId
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The last action of a sample, exactly one: finished with a reason, or failed with an error."""

    request: RequestId
    outcome: FinishReason | PdServeError
    report: Report


Output = Emit | EmitPrompt | End
Action = Send | Output
