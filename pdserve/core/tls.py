"""TLS by files that may be renewed at any time; mutual between a deployment's own processes."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.core.followed import FollowedFiles
from pdserve.core.security_settings import TlsFiles

log = logging.getLogger(__name__)


class RenewedContext:
    """A context of files, made again once they have changed; files that cannot be used leave the last one."""

    def __init__(self, make: Callable[[], ssl.SSLContext], files: Sequence[str]) -> None:
        """make: raises `ConfigError` for files that cannot be used; the first time here."""
        self._followed = FollowedFiles([Path(file) for file in files])
        self._make = make
        self._latest = make()

    def latest(self) -> ssl.SSLContext:
        """As the files are now."""
        if self._followed.changed():
            try:
                self._latest = self._make()
            except ConfigError as error:
                log.error("certificates stay as they were: %s", error)
            else:
                log.warning("certificates were read again")
        return self._latest

    def for_listening(self) -> ssl.SSLContext:
        """A context that shows, at every handshake, the certificate of then; connections that are up stay."""
        context = self._make()

        def renew(connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self.latest()

        # OpenSSL asks this with every hello, also of clients that name no host.
        context.sni_callback = renew
        return context


def accepting(files: TlsFiles | None) -> ssl.SSLContext | None:
    """For the side that listens. Raises `ConfigError` for files that cannot be used."""
    renewed = _mutual(files, ssl.PROTOCOL_TLS_SERVER)
    return None if renewed is None else renewed.for_listening()


def dialling(files: TlsFiles | None) -> RenewedContext | None:
    """For the side that connects. Raises `ConfigError` for files that cannot be used.

    Workers are dialled by address, which no certificate names: who holds a certificate of the deployment's
    own authority is one of us.
    """
    return _mutual(files, ssl.PROTOCOL_TLS_CLIENT)


def _mutual(files: TlsFiles | None, protocol: int) -> RenewedContext | None:
    if files is None:
        return None
    named = (files.cert_file, files.key_file, files.ca_file)

    def make() -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(files.cert_file, files.key_file)
            context.load_verify_locations(files.ca_file)
        except OSError as error:  # ssl.SSLError is one
            text = error.strerror or error
            raise ConfigError(f"security.cluster_tls: {', '.join(named)}: {text}") from error
        return context

    return RenewedContext(make, named)
