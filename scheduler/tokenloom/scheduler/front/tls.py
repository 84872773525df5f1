"""The server's side of TLS: certificates out of files that may change while it serves.

gRPC asks for them before each handshake. Connections that are there keep theirs until they end,
which `CONNECTION_AGE_MS` sees to.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.scheduler.versions import versions_of
from tokenloom.wire.keys import is_private, mode_told

CONNECTION_AGE_MS = 30 * 60 * 1000
"""After it a client is asked to connect again, and so to show a certificate that is still good;
its running streams go on over the old connection, as long as they take."""

_log = logging.getLogger(__name__)


def server_credentials(config: SchedulerConfig) -> grpc.ServerCredentials | None:
    """Returns with what to listen, None for no TLS. Raises ConfigError."""
    if not config.tls_cert:
        return None
    certificates = Certificates(config)
    return grpc.dynamic_ssl_server_credentials(
        certificates.current,
        certificates.changed,  # type: ignore[arg-type] # None is allowed, too
        require_client_authentication=bool(config.tls_client_ca),
    )


class Certificates:
    """What the files have, read again when they change.

    New files that cannot be used, such as a certificate whose key is yet to be written, are
    logged, and what was there before stays in force.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """Raises ConfigError."""
        self._cert = Path(config.tls_cert)
        self._key = Path(config.tls_key)
        self._client_ca = Path(config.tls_client_ca) if config.tls_client_ca else None
        self._files = tuple(
            path for path in (self._cert, self._key, self._client_ca) if path is not None
        )
        self._versions = versions_of(*self._files)
        self.current = self._read()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns new certificates, None for those of the last time. Called by gRPC's threads."""
        versions = versions_of(*self._files)
        if versions == self._versions:
            return None
        try:
            read = self._read()
        except ConfigError as error:
            self._versions = versions
            _log.error("the certificates stay as they were: %s", error)
            return None
        if versions_of(*self._files) != versions:  # what was read may be of both
            return None
        self._versions, self.current = versions, read
        _log.info("new connections get the certificate that %s has now", self._cert)
        return self.current

    def _read(self) -> grpc.ServerCertificateConfiguration:
        check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client_ca: bytes | None = None
        try:
            status = self._key.stat()
            if not is_private(status):
                raise ConfigError(f"tls_key {self._key} {mode_told(status)}")
            # Without a password OpenSSL asks the terminal for one.
            check.load_cert_chain(self._cert, self._key, password="")
            if self._client_ca is not None:
                check.load_verify_locations(self._client_ca)
                client_ca = self._client_ca.read_bytes()
            pair = (self._key.read_bytes(), self._cert.read_bytes())
        except OSError as error:  # of which ssl.SSLError is one
            files = ", ".join(map(str, self._files))
            raise ConfigError(f"{files} cannot be used for TLS: {error}") from error
        return grpc.ssl_server_certificate_configuration([pair], client_ca)
