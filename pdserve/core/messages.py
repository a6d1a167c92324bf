"""Messages between coordinator and workers; what workers tell each other is in `handover`.

A frame is a list of messages (see `codec`); a worker sends one frame per step to each coordinator.
Directions: *down* coordinator to worker, *up* worker to coordinator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pdserve.core.handover import PrefixNote, PushNote
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.sampling import SamplingParams, TokenLogprobs
from pdserve.core.worker_state import (
    BlockCounts,
    DeviceUsage,
    PairState,
    PrefixEvents,
    ProfileStep,
    TierCounts,
)


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class RefusalReason(StrEnum):
    NO_BLOCKS = "no_blocks"
    BATCH_FULL = "batch_full"
    DRAINING = "draining"
    UNKNOWN_PEER = "unknown_peer"
    TOO_LONG = "too_long"
    WRONG_ROLE = "wrong_role"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """What a worker must know of a request. `tokens`: prompt + output that earlier attempts streamed."""

    attempt: AttemptId
    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    """Ends the request unless `sampling.ignore_eos`; workers hold no tokenizer."""
    cache_salt: bytes
    """Model, adapter, KV dtype and tenant; the root of the prefix-hash chain."""
    arrival: float
    """Wall clock (`time.time()`), seconds."""
    ttft_deadline: float | None = None
    """Wall clock, seconds; prefill batches earliest first."""
    priority: int = 0
    """Lower is more urgent, as in vLLM."""
    tpot_target_s: float | None = None
    """Steps that write its answer hold as much of other prompts as this leaves room for."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


# --- down -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message on every connection, both ways; a protocol mismatch closes it with an error."""

    protocol: int
    sender: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectPeer:
    """Meet a transfer peer. Sent again with a new epoch after that peer restarted."""

    peer: WorkerId
    epoch: int
    fingerprint: Fingerprint
    metadata: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPeer:
    """The peer's process is gone for certain: forget it and release what only it could still reach."""

    peer: WorkerId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartDecode:
    """Reserve blocks for a request. The answer is `Reserved` or `Refused`.

    `prefill_worker` is who fills the blocks: a prefill worker, or the decode worker that a running request
    moves away from. None: this worker reads the prompt itself (colocated, or cheaper than moving it). One in
    the prefill role takes a request in this way only, reads the prompt and writes the whole answer; with a
    `prefill_worker` it answers `Refused` (WRONG_ROLE).
    """

    spec: RequestSpec
    prefill_worker: WorkerId | None
    lease_s: float
    ahead_tokens: int = 0
    """The request runs elsewhere meanwhile: its KV may be up to this much longer than `spec.tokens` when it
    comes. `Reserved.blocks` has room for that, as far as the answer can get so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPrefill:
    """Read a prompt and push its KV into `dst_blocks` of `decode_worker`, skipping what is cached there."""

    spec: RequestSpec
    decode_worker: WorkerId
    decode_epoch: int
    dst_blocks: list[BlockId]
    """Blocks for `spec.tokens`, in order, the cached ones first."""
    dst_cached_tokens: int
    """Prefix that the decode worker has already; a multiple of the block size."""
    transfer_deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrate:
    """Push the KV of a running attempt to another decode worker, which reserved blocks for it as `to`.

    Full blocks go while the attempt runs on; then it pauses, and the rest goes with the hand-over. It keeps
    its blocks until `Cancel(attempt)` says that it runs there, or goes on here after `Cancel(to)`. Every
    `Migrate` ends with exactly one `TransferDone` or `PushesSettled` of `to`, as every `StartPrefill` does.
    """

    attempt: AttemptId
    to: AttemptId
    num_tokens: int
    """Of the target's `spec.tokens`: a beginning of the attempt's tokens, and not all of them."""
    decode_worker: WorkerId
    decode_epoch: int
    dst_blocks: list[BlockId]
    dst_cached_tokens: int
    transfer_deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivePrefix:
    """Make room for the beginning of a prompt, which `writer` has in its prefix cache and will push here.

    To either role, from either; a movement of its own, before and apart from any request: `attempt` names
    nothing else. Who has not introduced the two yet (`ConnectPeer`, both ways) does so in the frame before.
    The answer is `Reserved` (blocks for every full block of `tokens`, those cached here first) or `Refused`.
    Then a coordinator sends `PushPrefix` to the writer, relays its last word as for a prefill
    (`PushesSettled`, where that is what it says), renews the lease if it likes, and may `Cancel`. It ends
    with exactly one `KvArrived` (the prefix is in the cache here: a `StartPrefill` or `StartDecode` that
    follows hits it, unless it was evicted meanwhile) or `AttemptFailed`, none after `Cancel`. `Reserved` with
    all of `tokens` cached ends it too: nothing is held, nothing is to be pushed.
    """

    attempt: AttemptId
    tokens: list[int]
    """Whole blocks of this worker's; what is beyond the last one is ignored."""
    cache_salt: bytes
    """As in `RequestSpec`."""
    writer: WorkerId
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPrefix:
    """Push the beginning of a prompt from the prefix cache here, of either role, into a peer that lacks it.

    `dst_blocks` and `dst_cached_tokens` are what the peer `Reserved` for `ReceivePrefix`. What is cached here
    by now is pushed, which may be less than `tokens`; nothing at all is a failure. Ends, as a `StartPrefill`
    does, with exactly one `TransferDone` or `PushesSettled`; after `Cancel` too.
    """

    attempt: AttemptId
    tokens: list[int]
    cache_salt: bytes
    worker: WorkerId
    """Who lacks it."""
    worker_epoch: int
    dst_blocks: list[BlockId]
    dst_cached_tokens: int
    transfer_deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewLease:
    attempt: AttemptId
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop an attempt and return its blocks; a later message of it is ignored.

    A decode worker still waiting for pushes quarantines the attempt's blocks until `PushesSettled` or
    `DropPeer`; a prefill worker answers with `PushesSettled` (see there), also for an attempt it never saw. A
    decode worker does so for what it does not know: it may have been a migration's.
    """

    attempt: AttemptId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushesSettled:
    """No write of this attempt can land any more. From a prefill worker, relayed to the decode worker, which
    may then release the blocks it quarantined when the attempt ended early.

    A prefill worker ends every `StartPrefill` and answers every `Cancel` with exactly one `TransferDone`
    (success) or `PushesSettled` (anything else), as its last message of the attempt.
    """

    attempt: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Take no new requests; finish those that run, or see them moved away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Undrain:
    """Take new requests again, whoever asked for the drain. A process that was told to end (SIGTERM) ends all
    the same: its heartbeats go on saying that it drains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRole:
    """Take up another role in the same process: pool, prefix cache, epoch and transfer connections stay.

    From here on new requests of the old role are refused (WRONG_ROLE, or `AttemptFailed` and `PushesSettled`
    of a `StartPrefill`) and those of the new one are taken. What runs goes on, as `Migrate`, `Cancel` and
    `Preempt` find it, whatever the role. `RoleChanged` follows when nothing of the old role is left, at once
    for the role that the worker has. The coordinator introduces the peers (`ConnectPeer`) that the new role
    needs before it sends work. A later `ChangeRole` supersedes one that is under way.
    """

    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempt:
    """Give a request up for a more urgent one: a decode worker frees its blocks (full ones stay cached while
    there is room) and answers `Preempted`, its last message of the attempt. Whoever asked begins a new one
    later, with the tokens streamed so far. An attempt that it does not run, or that waits for pushes or is on
    its way to another worker, is left alone and nothing is answered: `Cancel` is for those."""

    attempt: AttemptId


# --- up ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SendPrefixes:
    """Something of `PrefixEvents` was missed: say all there is, as a snapshot."""

    after: int
    """Sequence number of the last ones that were heard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A worker introduces itself, after `Hello`."""

    worker: WorkerId
    role: Role
    epoch: int
    """Of the process: a restarted worker has a higher one."""
    pid: int
    host: str
    fingerprint: Fingerprint
    transfer_metadata: bytes
    num_blocks: int
    block_tokens: int
    max_model_len: int
    max_num_seqs: int
    device: str = ""
    """What it computes on: a GPU's name, or `cpu`."""
    num_devices: float = 1.0
    """GPUs (a share where one is shared), or cores: what is paid for."""
    profile: list[ProfileStep] = field(default_factory=list)
    """How fast it is, as it measured when it started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    attempt: AttemptId
    blocks: list[BlockId]
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    attempt: AttemptId
    reason: RefusalReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStarted:
    attempt: AttemptId
    cached_tokens: int
    """Prefix hit on the prefill worker itself."""
    queue_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillProgress:
    """A chunk is done; renews the decode side's lease."""

    attempt: AttemptId
    tokens_done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDone:
    """The prompt is read and the first token sampled; its KV may still be on the way."""

    attempt: AttemptId
    token: int
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[TokenLogprobs | None]
    finish_reason: FinishReason | None
    """Set when the first token ends the answer: then nothing more is pushed."""
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferDone:
    """From the worker that pushed: every push of this attempt is terminal."""

    attempt: AttemptId
    bytes_moved: int
    exposed_s: float
    """From the end of prefill compute to the last push's completion."""
    busy_s: float
    """Time its pushes took, summed, as the transfer thread measured it."""
    path: str
    """cuda_ipc, rdma, shm, tcp, local or fake; what was really chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvArrived:
    """From the decode worker: hand-over checked, request runnable."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of one request from one step. The first token comes from both workers; `first_index` dedups."""

    attempt: AttemptId
    first_index: int
    """Index of tokens[0] in the output (0 is the first generated token, over all attempts)."""
    tokens: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Empty, or one per token."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    attempt: AttemptId
    code: str
    """An `ErrorCode`."""
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """From a decode worker: the attempt was given up after `Preempt`. Every token of it was sent before; the
    same seed goes on with the same ones."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChanged:
    """To every coordinator: the worker has this role, and nothing of another one is left on it."""

    worker: WorkerId
    epoch: int
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphaned:
    """From a decode worker, to every coordinator it meets: blocks are in quarantine for an attempt whose own
    coordinator is gone. Who can ask `writer` answers with `PushesSettled`."""

    attempt: AttemptId
    writer: WorkerId
    writer_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Sent off the compute loop, every `heartbeat_s`; silence means dead."""

    worker: WorkerId
    epoch: int
    blocks: BlockCounts
    waiting: int
    """Requests that have not started computing."""
    running: int
    waiting_tokens: int
    """Prompt tokens not yet computed (prefill), or context tokens in the batch (decode)."""
    step_s: float
    """Moving average of a step's duration."""
    tokens_per_s: float
    prefix_hit_tokens: int
    """Since start."""
    prefix_query_tokens: int
    steps: int
    draining: bool = False
    step_age_s: float = 0.0
    """How long the step under way has lasted; 0 between steps."""
    tokens_computed: int = 0
    """Since start, prompt and answer."""
    busy_s: float = 0.0
    """Since start, in steps."""
    device: DeviceUsage | None = None
    """None: nothing could be read."""
    tiers: TierCounts = field(default_factory=TierCounts)
    """All zero where there are none."""
    pairs: list[PairState] = field(default_factory=list)
    """Of every transfer peer that was met."""
    role: Role | None = None
    """What it takes new requests of; None: what `WorkerInfo` said. See `ChangeRole`."""
    stopping: bool = False
    """Its process was told to end: it drains, and is gone when it is empty or its time is up."""
    preemptions: int = 0
    """Since start: requests that lost their blocks to a more urgent one, for want of room or by `Preempt`."""
    proposed_at: list[int] = field(default_factory=list)
    """Since start: tokens that speculative decoding proposed, by their position in a proposal."""
    accepted_at: list[int] = field(default_factory=list)
    """Of these, accepted."""


Down = (
    Hello
    | ConnectPeer
    | DropPeer
    | StartDecode
    | StartPrefill
    | Migrate
    | ReceivePrefix
    | PushPrefix
    | RenewLease
    | Cancel
    | PushesSettled
    | Drain
    | Undrain
    | ChangeRole
    | Preempt
    | SendPrefixes
)
Up = (
    Hello
    | WorkerInfo
    | Reserved
    | Refused
    | PrefillStarted
    | PrefillProgress
    | PrefillDone
    | TransferDone
    | PushesSettled
    | KvArrived
    | Tokens
    | AttemptFailed
    | Preempted
    | RoleChanged
    | Orphaned
    | Heartbeat
    | PrefixEvents
)
Across = PushNote | PrefixNote
Message = Down | Up | Across
