"""How both clients reach a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc

from pdserve.core.errors import ConfigError

MIB: Final = 2**20
OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),  # an answer with prompt log-probabilities may be long
    ("grpc.max_send_message_length", -1),  # the server says what is too long, and names its limit
    ("grpc.keepalive_time_ms", 30_000),
)
SERVICE: Final = "/pdserve.v1.Generation/"
DEFAULT_TIMEOUT_S: Final = 600.0


_TLS_PREFIX: Final = "grpcs://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a client gets in where the server asks who is there. The default is plain text and no key.

    `grpcs://host:port` as the address means TLS with the system's authorities, whatever is said here.
    """

    api_key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    """TLS: the authority (PEM) of the server's certificate."""
    cert_file: Path | None = None
    """Mutual TLS: our own certificate (PEM)."""
    key_file: Path | None = None
    """Mutual TLS: its private key (PEM)."""

    def channel(self, address: str) -> grpc.Channel:
        """A blocking channel. Raises `ConfigError` for files that cannot be read."""
        credentials = self._credentials(address)
        target = target_of(address)
        if credentials is None:
            channel = grpc.insecure_channel(target, options=OPTIONS)
        else:
            channel = grpc.secure_channel(target, credentials, options=OPTIONS)
        return channel if self.api_key is None else grpc.intercept_channel(channel, _SendKey(self.api_key))

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """A channel for asyncio. Raises as `channel` does."""
        credentials = self._credentials(address)
        target = target_of(address)
        key = self.api_key
        # gRPC files an interceptor under the first kind that it is.
        interceptors: list[Any] = [] if key is None else [_SendKeyUnary(key), _SendKeyStream(key)]
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=OPTIONS, interceptors=interceptors)
        return grpc.aio.secure_channel(target, credentials, options=OPTIONS, interceptors=interceptors)

    def _credentials(self, address: str) -> grpc.ChannelCredentials | None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("mutual TLS wants a certificate and its key")
        if not address.startswith(_TLS_PREFIX) and self.ca_file is None and self.cert_file is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_bytes_of(self.ca_file),
            private_key=_bytes_of(self.key_file),
            certificate_chain=_bytes_of(self.cert_file),
        )


OPEN_ACCESS: Final = Access()


def target_of(address: str) -> str:
    """`host:port`, `unix:/path` or `dns:///name:port`; a leading `grpc://` or `grpcs://` is taken off."""
    return address.removeprefix("grpc://").removeprefix(_TLS_PREFIX)


def _bytes_of(file: Path | None) -> bytes | None:
    try:
        return None if file is None else file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error


class _CallDetails(NamedTuple):
    """A call's details, as interceptors hand them on."""

    method: Any
    timeout: Any
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


def _with_key(details: Any, key: str) -> Any:
    metadata = [*(details.metadata or ()), ("authorization", f"Bearer {key}")]
    return _CallDetails(
        details.method,
        details.timeout,
        metadata,
        details.credentials,
        details.wait_for_ready,
        getattr(details, "compression", None),
    )


class _SendKey(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]  # generic in the stubs alone
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
):
    def __init__(self, key: str) -> None:
        self._key = key

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(_with_key(details, self._key), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(_with_key(details, self._key), request)


class _SendKeyUnary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    def __init__(self, key: str) -> None:
        self._key = key

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(_aio_with_key(client_call_details, self._key), request)


class _SendKeyStream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    def __init__(self, key: str) -> None:
        self._key = key

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(_aio_with_key(client_call_details, self._key), request)


def _aio_with_key(details: Any, key: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("authorization", f"Bearer {key}")
    return grpc.aio.ClientCallDetails(
        method=details.method,
        timeout=details.timeout,
        metadata=metadata,
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )
