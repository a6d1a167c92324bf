"""Who may talk to the service, and how that is kept from others: as the configuration has it."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from pdserve.core.settings import Frozen


class TlsFiles(Frozen):
    """PEM files of one side of a mutual TLS connection."""

    cert_file: str
    """Certificate, with what leads to its authority."""
    key_file: str
    """Its private key."""
    ca_file: str
    """Authorities whose certificates the other side may show."""


class SecuritySettings(Frozen):
    tls_cert_file: str | None = None
    """Certificate (PEM) of the gRPC endpoint; none: it speaks plain text. Read again when it changes."""
    tls_key_file: str | None = None
    """Its private key (PEM)."""
    tls_client_ca_file: str | None = None
    """Mutual TLS: only clients that show a certificate of these authorities (PEM) get through."""
    api_keys_file: str | None = None
    """Keys that clients must send, with what each may do; `pdserve keys new` makes one. Read again when it
    changes. The environment variable PDSERVE_API_KEYS may hold the same text instead."""
    cluster_tls: TlsFiles | None = None
    """Mutual TLS between coordinator and workers, wherever they talk by TCP. KV does not go that way: see
    docs/security.md."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("give tls_cert_file and tls_key_file together")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        return self
