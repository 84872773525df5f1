"""Real certificates for tests: CAs, and what they issue, as PEM files."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SERVER_NAMES = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
)


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate and its key, as PEM."""

    cert: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Puts both into files, one after the other; returns their paths."""
        return put(folder / f"{name}.pem", self.cert), put(folder / f"{name}.key", self.key)


class CA:
    """Issues certificates."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        self._cert = (
            _builder(self._name, self._name, self._key, timedelta(days=1))
            .add_extension(constraints, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = _pem(self._cert)

    def server(self, **changes: timedelta) -> Issued:
        """Returns a certificate for this host."""
        return self.issue(SERVER_NAMES, **changes)

    def client(self, *uris: str, **changes: timedelta) -> Issued:
        """Returns a certificate with URIs, as SPIFFE has them."""
        return self.issue([x509.UniformResourceIdentifier(uri) for uri in uris], **changes)

    def issue(
        self, names: Sequence[x509.GeneralName], *, lasts: timedelta = timedelta(days=1)
    ) -> Issued:
        """Returns a certificate that is good until then; a negative time is over."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = _builder(_name("test"), self._name, key, lasts)
        if names:
            cert = cert.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Issued(
            cert=_pem(cert.sign(self._key, hashes.SHA256())),
            key=key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )


def put(path: Path, data: bytes) -> Path:
    """Puts a new version in a file's place, as rotation does it, readable by its owner alone."""
    draft = path.with_name(f"{path.name}.draft")
    draft.touch(mode=0o600)
    draft.write_bytes(data)
    return draft.replace(path)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lasts: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + lasts)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)
