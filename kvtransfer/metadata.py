"""What a worker tells its peers so that they can write into its pools; msgpack, versioned."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Final

import msgpack

from kvtransfer.protocol import PoolRegion
from pdserve.core.errors import FingerprintMismatch, TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint

METADATA_VERSION: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePool:
    """A peer's pool: its address there, and its CUDA device there (None: host memory)."""

    address: int
    num_blocks: int
    device: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerMetadata:
    """`scratch` is memory that anybody may write: probes land in it."""

    transport: str
    worker: WorkerId
    epoch: int
    host: str
    """Equal on workers that run under one kernel."""
    rdma: bool
    """Its host has an RDMA device."""
    agent: str
    agent_metadata: bytes
    pools: tuple[RemotePool, ...]
    scratch: RemotePool | None
    fingerprint: str


def fingerprint_digest(fingerprint: Fingerprint) -> str:
    """Hex digest over every field of a fingerprint."""
    packed = msgpack.packb(dataclasses.asdict(fingerprint))
    return hashlib.sha256(packed).hexdigest()[:32]


def remote_pools(regions: tuple[PoolRegion, ...]) -> tuple[RemotePool, ...]:
    """This worker's pools as its peers see them."""
    return tuple(RemotePool(address=r.address, num_blocks=r.num_blocks, device=r.device) for r in regions)


def encode_metadata(metadata: PeerMetadata) -> bytes:
    fields = [getattr(metadata, f.name) for f in dataclasses.fields(PeerMetadata)]
    packed: bytes = msgpack.packb(
        [METADATA_VERSION, *fields], default=lambda pool: [pool.address, pool.num_blocks, pool.device]
    )
    return packed


def decode_metadata(data: bytes) -> PeerMetadata:
    """Raises `TransferError` for bytes that are not this version's metadata."""
    try:
        version, *fields = msgpack.unpackb(data)
        if version != METADATA_VERSION:
            raise TransferError(
                f"transfer metadata of version {version}, wanted {METADATA_VERSION}: upgrade both workers"
            )
        transport, worker, epoch, host, rdma, agent, agent_metadata, pools, scratch, fingerprint = fields
        return PeerMetadata(
            transport=transport,
            worker=WorkerId(worker),
            epoch=epoch,
            host=host,
            rdma=rdma,
            agent=agent,
            agent_metadata=agent_metadata,
            pools=tuple(_pool(pool) for pool in pools),
            scratch=None if scratch is None else _pool(scratch),
            fingerprint=fingerprint,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise TransferError(f"transfer metadata of {len(data)} bytes cannot be read: {error}") from error


def _pool(fields: list[int | None]) -> RemotePool:
    address, num_blocks, device = fields
    if address is None or num_blocks is None:
        raise ValueError("a pool without address or size")
    return RemotePool(address=address, num_blocks=num_blocks, device=device)


def meet(
    ours: Fingerprint, peer: WorkerId, epoch: int, theirs: Fingerprint, metadata: bytes, transport: str
) -> PeerMetadata:
    """Decode a peer's metadata and compare everything that must agree before the first byte.

    Raises `FingerprintMismatch`, and `TransferError` when the metadata is not that peer's.
    """
    ours.require_transferable(theirs, peer=peer)
    found = decode_metadata(metadata)
    if found.transport != transport:
        raise FingerprintMismatch(peer, "transfer backend", transport, found.transport)
    if (found.worker, found.epoch) != (peer, epoch):
        raise TransferError(f"metadata of {found.worker}@{found.epoch} was given for {peer}@{epoch}")
    if found.fingerprint != fingerprint_digest(theirs):
        raise FingerprintMismatch(peer, "fingerprint digest", fingerprint_digest(theirs), found.fingerprint)
    if len(found.pools) != len(theirs.layouts):
        raise FingerprintMismatch(peer, "pools", len(theirs.layouts), len(found.pools))
    return found
