"""API keys: who they belong to, what they allow, and how a presented one is found.

Only digests are kept. A presented key is compared with all of them, in a time that tells nothing about which
one came close. Keys are random (256 bits), so a fast digest is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from pdserve.core.errors import ConfigError, PermissionDenied, Unauthenticated
from pdserve.core.followed import FollowedFiles
from pdserve.core.settings import Frozen

log = logging.getLogger(__name__)

_LOOK_AGAIN_S: Final = 1.0
PREFIX: Final = "pds_"
"""Of keys that we make: secret scanners know what they have found."""


class Scope(StrEnum):
    GENERATE = "generate"
    """Ask models, and list them."""
    OBSERVE = "observe"
    """See what goes on: explanations of requests, plans, the console."""
    ADMIN = "admin"
    """Change it: drains, role changes. Includes the others."""


class KeyEntry(Frozen):
    """One key, as its file has it."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    """Whose it is, for logs."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Digest of the key: `pdserve keys new` prints it."""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = (Scope.GENERATE,)
    tenant: str | None = None
    """Requests with this key are this tenant's, with its limits and weight. None: they may say whose."""


class _KeyFile(Frozen):
    keys: Annotated[tuple[KeyEntry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [key.name for key in self.keys]
        if len(set(names)) != len(names):
            raise ValueError("names of keys must differ")
        return self


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    name: str
    scopes: frozenset[Scope]
    tenant: str | None

    def require(self, scope: Scope) -> None:
        """Raises `PermissionDenied` when its key does not allow that."""
        if scope not in self.scopes and Scope.ADMIN not in self.scopes:
            raise PermissionDenied(f"the key of {self.name} has no scope {scope.value}")


class ApiKeys:
    """Looks keys up. `from_file` follows changes of its file; one that cannot be read leaves the old keys."""

    def __init__(
        self,
        entries: Sequence[KeyEntry],
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._entries = _digests(entries)
        self._file, self._clock = file, clock
        self._followed = FollowedFiles(() if file is None else (file,))
        self._look_again = clock() + _LOOK_AGAIN_S

    @classmethod
    def from_file(cls, file: Path, clock: Callable[[], float] = time.monotonic) -> ApiKeys:
        """Raises `ConfigError`, which never shows what the file holds."""
        return cls(_read(file), file, clock)

    @classmethod
    def from_text(cls, text: str, source: str) -> ApiKeys:
        """Raises `ConfigError`, which never shows the text."""
        return cls(_parse(text, source))

    def caller(self, key: str | None) -> Caller:
        """Raises `Unauthenticated`."""
        self._follow()
        if not key:
            raise Unauthenticated("this service wants an API key: send `authorization: Bearer KEY`")
        presented = hashlib.sha256(key.encode()).digest()
        found: Caller | None = None
        for digest, caller in self._entries:
            if hmac.compare_digest(digest, presented):
                found = caller
        if found is None:
            raise Unauthenticated("the API key is not known here")
        return found

    def _follow(self) -> None:
        if self._file is None or self._clock() < self._look_again:
            return
        self._look_again = self._clock() + _LOOK_AGAIN_S
        if not self._followed.changed():
            return
        try:
            self._entries = _digests(_read(self._file))
        except ConfigError as error:
            log.error("API keys stay as they were: %s", error)
        else:
            log.warning("API keys were read again: %d keys", len(self._entries))


def new_key() -> tuple[str, str]:
    """A key, and its digest for the file of keys."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hashlib.sha256(key.encode()).hexdigest()


def _digests(entries: Sequence[KeyEntry]) -> list[tuple[bytes, Caller]]:
    return [
        (bytes.fromhex(entry.sha256), Caller(entry.name, frozenset(entry.scopes), entry.tenant))
        for entry in entries
    ]


def _read(file: Path) -> tuple[KeyEntry, ...]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"security.api_keys_file: {file}: {getattr(error, 'strerror', 'no text')}"
        ) from error
    return _parse(text, f"security.api_keys_file: {file}")


def _parse(text: str, source: str) -> tuple[KeyEntry, ...]:
    # No cause is kept with these errors: it would show the text.
    try:
        data = yaml.safe_load(text)
        # A bare list as well, so that what `pdserve keys new` prints can be appended.
        return _KeyFile.model_validate({"keys": data} if isinstance(data, list) else data).keys
    except yaml.YAMLError:
        raise ConfigError(f"{source}: no YAML") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{source}: {where}: {first['msg']}") from None
