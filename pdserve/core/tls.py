"""Mutual TLS between a deployment's own processes."""

from __future__ import annotations

import ssl

from pdserve.core.errors import ConfigError
from pdserve.core.security_settings import TlsFiles


def accepting(files: TlsFiles | None) -> ssl.SSLContext | None:
    """For the side that listens. Raises `ConfigError` for files that cannot be used."""
    return None if files is None else _context(files, ssl.PROTOCOL_TLS_SERVER)


def dialling(files: TlsFiles | None) -> ssl.SSLContext | None:
    """For the side that connects. Raises `ConfigError` for files that cannot be used.

    Workers are dialled by address, which no certificate names: who holds a certificate of the deployment's
    own authority is one of us.
    """
    return None if files is None else _context(files, ssl.PROTOCOL_TLS_CLIENT)


def _context(files: TlsFiles, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(files.cert_file, files.key_file)
        context.load_verify_locations(files.ca_file)
    except OSError as error:  # ssl.SSLError is one
        named = ", ".join((files.cert_file, files.key_file, files.ca_file))
        raise ConfigError(f"security.cluster_tls: {named}: {error.strerror or error}") from error
    return context
