"""The gRPC server: which services it has, who may reach them, and over what."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1._async import HealthServicer  # `health.aio`, which the stubs do not know
from grpc_reflection.v1alpha import reflection

from coordinator.admin import SERVICE as ADMIN_SERVICE
from coordinator.admin import Admin
from coordinator.auth import Authenticate
from coordinator.gateway import SERVICE, Gateway
from coordinator.keys import ApiKeys, Scope
from pdserve.core.config import CoordinatorSettings
from pdserve.core.errors import ConfigError
from pdserve.core.followed import FollowedFiles
from pdserve.core.security_settings import SecuritySettings
from pdserve.core.tls import RenewedContext

log = logging.getLogger(__name__)

_MIB: Final = 2**20
SCOPES: Final = {
    SERVICE: Scope.GENERATE,
    reflection.SERVICE_NAME: Scope.GENERATE,
    "grpc.reflection.v1.ServerReflection": Scope.GENERATE,
    f"/{ADMIN_SERVICE}/Explain": Scope.OBSERVE,
    f"/{ADMIN_SERVICE}/Plan": Scope.OBSERVE,
}
"""What methods want; whatever is not here wants ADMIN."""


def listen(
    settings: CoordinatorSettings,
    security: SecuritySettings,
    keys: ApiKeys | None,
    gateway: Gateway,
    admin: Admin,
    health_servicer: HealthServicer,
) -> tuple[grpc.aio.Server, int]:
    """A server that is about to start, and its port. Raises `ConfigError`: port taken, no such file."""
    server = grpc.aio.server(
        interceptors=[] if keys is None else [Authenticate(keys, SCOPES)],
        options=[
            ("grpc.max_receive_message_length", settings.max_message_mib * _MIB),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a coin toss
            ("grpc.http2.bdp_probe", 0),  # pings that pay only for large messages
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ],
    )
    server.add_generic_rpc_handlers((gateway.handler(), admin.handler()))
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        (SERVICE, ADMIN_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    address = f"{settings.host}:{settings.port}"
    credentials = _credentials(security)
    try:
        if credentials is None:
            return server, server.add_insecure_port(address)
        return server, server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"coordinator.port: cannot listen on {address}; choose another (0: any)") from error


def api_keys(security: SecuritySettings, text: str | None) -> ApiKeys | None:
    """The keys that clients must have; None: they need none. text: what the environment says of them.

    Raises `ConfigError`, also where both sources are given.
    """
    if text is not None and security.api_keys_file is not None:
        raise ConfigError("API keys stand in security.api_keys_file and in PDSERVE_API_KEYS; remove one")
    if text is not None:
        return ApiKeys.from_text(text, "PDSERVE_API_KEYS")
    return None if security.api_keys_file is None else ApiKeys.from_file(Path(security.api_keys_file))


def _credentials(security: SecuritySettings) -> grpc.ServerCredentials | None:
    """Files are read again at a handshake when they have changed: certificates are renewed under way."""
    if security.tls_cert_file is None or security.tls_key_file is None:
        return None
    files = [Path(security.tls_cert_file), Path(security.tls_key_file)]
    if security.tls_client_ca_file is not None:
        files.append(Path(security.tls_client_ca_file))
    followed = FollowedFiles(files)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """None: as before."""
        if not followed.changed():
            return None
        try:
            certificates = _certificates(files)
        except ConfigError as error:
            log.error("certificates stay as they were: %s", error)
            return None
        log.warning("certificates were read again")
        return certificates

    return grpc.dynamic_ssl_server_credentials(
        _certificates(files),
        renewed,  # type: ignore[arg-type]  # None is fine, which the stubs do not know
        require_client_authentication=len(files) > 2,
    )


def web_tls(security: SecuritySettings) -> ssl.SSLContext | None:
    """The endpoint's certificate for the console, as it is at each handshake. Browsers show none.

    Raises `ConfigError`.
    """
    cert, key = security.tls_cert_file, security.tls_key_file
    if cert is None or key is None:
        return None

    def make() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(cert, key)
        except OSError as error:
            raise ConfigError(f"security.tls_cert_file: {cert}: {error}") from error
        return context

    return RenewedContext(make, (cert, key)).for_listening()


def _certificates(files: list[Path]) -> grpc.ServerCertificateConfiguration:
    try:
        cert, key, *authorities = [file.read_bytes() for file in files]
    except OSError as error:
        raise ConfigError(f"security: {error.filename}: {error.strerror}") from error
    return grpc.ssl_server_certificate_configuration(
        [(key, cert)], root_certificates=authorities[0] if authorities else None
    )
