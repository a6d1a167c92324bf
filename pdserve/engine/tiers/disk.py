"""Blocks on disk: a file each, with a header that says what it is and a digest of its bytes.

    <directory>/identity                  whose KV this is: a digest of the worker's fingerprint
               /lock                      held by the process that uses it
               /<prefix hash>.kv          header | block

A file is written under another name and renamed, without waiting for the disk: after a power failure it may
be torn, which its digest tells. Whatever cannot be read, or is not what it should be, is removed and counted,
and is a miss.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from pdserve.core.errors import ConfigError
from pdserve.engine.prefix_cache import BlockHash
from pdserve.engine.tiers.blocks import Bytes

log = logging.getLogger(__name__)

_MAGIC: Final = b"pdkvtier"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sI32s16sQQ")
"""Magic, version, identity, prefix hash, bytes that follow, XXH3 of these."""
_SUFFIX: Final = ".kv"
_SCRATCH: Final = ".new"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DirectoryInUse(ConfigError):
    """Another process has the tier's directory."""


@dataclass(slots=True)
class DiskCounters:
    """Since start."""

    corrupt: int = 0
    errors: int = 0
    dropped: int = 0


class DiskTier:
    """At most `size_bytes` of blocks under `directory`, the longest unused removed first.

    Blocks of an earlier process are found again if their identity is this one's; others are removed. Used by
    one thread, but for `in`. Raises `ConfigError` when the directory cannot be used.
    """

    def __init__(self, directory: Path, size_bytes: int, block_bytes: int, identity: bytes) -> None:
        self._directory, self._identity = directory, identity
        self._file_bytes = _HEADER.size + block_bytes
        self._limit = size_bytes // self._file_bytes
        self._files: OrderedDict[BlockHash, None] = OrderedDict()
        self.counters = DiskCounters()
        self.on_forget: Callable[[BlockHash], object] | None = None
        """Told of every block that is here no more."""
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cache.disk_tier_path: {directory} cannot be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover()
        except OSError as error:
            os.close(self._lock)
            if error.errno == errno.EWOULDBLOCK:
                raise DirectoryInUse(
                    f"cache.disk_tier_path: {directory} is in use by another worker process"
                ) from error
            raise ConfigError(f"cache.disk_tier_path: {directory} cannot be used: {error}") from error

    def __contains__(self, digest: BlockHash) -> bool:
        return digest in self._files

    def digests(self) -> list[BlockHash]:
        return list(self._files)

    @property
    def used_bytes(self) -> int:
        return len(self._files) * self._file_bytes

    def read(self, digest: BlockHash, into: Bytes) -> bool:
        """Fill `into` with the block, which is the newest now. False: it is not there, or not whole."""
        if digest not in self._files:
            return False
        try:
            with open(self._path(digest), "rb", buffering=0) as file:
                header = bytearray(_HEADER.size)
                size = os.readv(file.fileno(), [header, into.data])
        except FileNotFoundError:
            self._forget(digest)
            return False
        except OSError as error:
            self.counters.errors += 1
            log.warning("KV block %s cannot be read from disk: %s", digest.hex(), error)
            self._forget(digest)
            return False
        if size == self._file_bytes and bytes(header) == self._header(digest, into):
            self._files.move_to_end(digest)
            return True
        self.counters.corrupt += 1
        log.warning("KV block %s on disk is damaged: it is removed, and computed anew", digest.hex())
        self._forget(digest)
        return False

    def write(self, digest: BlockHash, data: Bytes) -> bool:
        """Keep a block. False: there is no room, or the disk failed."""
        if digest in self._files:
            self._files.move_to_end(digest)
            return True
        while self._files and len(self._files) >= self._limit:
            self._drop_oldest()
        if self._limit < 1:
            return False
        path = self._path(digest)
        scratch = path.with_suffix(_SCRATCH)
        try:
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                if os.writev(fd, [self._header(digest, data), data.data]) != self._file_bytes:
                    raise OSError(errno.ENOSPC, "the disk took a part of a block")
            finally:
                os.close(fd)
            os.rename(scratch, path)
        except OSError as error:
            self._failed(error, scratch)
            return False
        self._files[digest] = None
        return True

    def close(self) -> None:
        os.close(self._lock)

    def _failed(self, error: OSError, scratch: Path) -> None:
        self.counters.errors += 1
        with contextlib.suppress(OSError):
            scratch.unlink()
        if error.errno in _FULL and self._limit > len(self._files):
            # Others fill this disk: from now on what is here makes room for what comes.
            self._limit = len(self._files)
            log.warning(
                "the disk tier is full at %d blocks, before its bound: %s", len(self._files), error.strerror
            )
        elif error.errno not in _FULL:
            log.warning("a KV block cannot be written to disk: %s", error)

    def _drop_oldest(self) -> None:
        self.counters.dropped += 1
        self._forget(next(iter(self._files)))

    def _forget(self, digest: BlockHash) -> None:
        self._files.pop(digest, None)
        if self.on_forget is not None:
            self.on_forget(digest)
        with contextlib.suppress(OSError):
            self._path(digest).unlink()

    def _recover(self) -> None:
        identity = self._directory / "identity"
        known = identity.read_bytes() if identity.exists() else b""
        found = [path for path in self._directory.iterdir() if path.suffix in (_SUFFIX, _SCRATCH)]
        usable = [path for path in found if known == self._identity and self._is_whole(path)]
        for path in set(found) - set(usable):
            path.unlink(missing_ok=True)
        if known != self._identity:
            identity.write_bytes(self._identity)
        for path in sorted(usable, key=lambda path: path.stat().st_mtime_ns):
            self._files[BlockHash(bytes.fromhex(path.stem))] = None
        while len(self._files) > self._limit:
            self._drop_oldest()
        if found:
            log.info("disk tier: %d of %d files are this model's blocks", len(self._files), len(found))

    def _is_whole(self, path: Path) -> bool:
        """As far as its name and size say; its digest is compared when it is read."""
        try:
            named = path.suffix == _SUFFIX and len(bytes.fromhex(path.stem)) == 16
        except ValueError:
            return False
        if named and path.stat().st_size != self._file_bytes:
            self.counters.corrupt += 1
            return False
        return named

    def _path(self, digest: BlockHash) -> Path:
        return self._directory / (digest.hex() + _SUFFIX)

    def _header(self, digest: BlockHash, data: Bytes) -> bytes:
        checked = xxhash.xxh3_64_intdigest(np.ascontiguousarray(data).data)
        return _HEADER.pack(_MAGIC, _VERSION, self._identity, digest, data.nbytes, checked)
