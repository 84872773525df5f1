"""What a client proves itself with, and servers by: certificates and bearer tokens.

    Client("models.example.org:443", credentials=TLS(), token=Path("/run/secrets/token"))
    Client("10.0.0.1:50051", credentials=TLS(ca="ca.pem", cert="client.pem", key="client.key"))

What is in files is read again when it changes: a token by the next call, certificates by the next
call, too, over a new connection, while running streams go on over the one they have.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import grpc

from tokenloom.client.errors import AccessDenied

StrPath: TypeAlias = str | os.PathLike[str]
Token: TypeAlias = str | os.PathLike[str]
"""A `str` is the token itself, a path names the file that holds it."""
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

_Versions: TypeAlias = tuple[tuple[int, int, int] | None, ...]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TLS:
    """Encryption by files of PEM."""

    ca: StrPath | None = None
    """Of the CAs that servers' certificates come from; None: those that gRPC brings."""
    cert: StrPath | None = None
    """The client's own certificate, and those between it and its CA; None: it shows none."""
    key: StrPath | None = None
    """Of that certificate."""
    server_name: str | None = None
    """What servers' certificates say, where that is not the host of the target, as for a list of
    IP addresses."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS needs cert and key, or neither: a certificate goes with its key")

    @property
    def files(self) -> tuple[Path, ...]:
        """What to read."""
        return tuple(Path(each) for each in (self.ca, self.cert, self.key) if each is not None)


@dataclass(frozen=True, kw_only=True)
class Access:
    """All that a client brings to a server beside its requests."""

    credentials: TLS | grpc.ChannelCredentials | None = None
    """None: plaintext."""
    token: Token | None = field(default=None, repr=False)
    insecure: bool = False
    """Whether the token may go in plaintext to another host, in a network that encrypts."""

    def check(self, target: str) -> None:
        """Raises ValueError for files that cannot be used, and where others could read a token."""
        Credentials(self.credentials)
        if isinstance(self.token, str):
            _check_token(self.token)
        if self.token is None or self.credentials is not None or self.insecure:
            return
        if not is_local(target):
            raise ValueError(
                f"a token would go to {target} in plaintext: give credentials=TLS(…), or "
                "insecure=True where the network encrypts by itself"
            )

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """What a channel needs to know of it."""
        match self.credentials:
            case TLS(server_name=str() as name):
                return (("grpc.ssl_target_name_override", name),)
            case _:
                return ()

    def metadata(self) -> Metadata:
        """Returns what each call bears. Raises AccessDenied if there is no token in its file."""
        if self.token is None:
            return ()
        return (("authorization", f"Bearer {_read_token(self.token)}"),)


PLAIN = Access()
"""Nothing at all."""


class Credentials:
    """What channels are opened with: `current`, made again when the files of a TLS change.

    Files that cannot be used, such as a certificate whose key is yet to be written, are logged,
    and the credentials before them stay in use.
    """

    def __init__(self, given: TLS | grpc.ChannelCredentials | None) -> None:
        """Raises ValueError."""
        self._tls = given if isinstance(given, TLS) else None
        self._versions = _versions_of(self._tls)
        self.current = _credentials(given) if isinstance(given, TLS) else given

    def renew(self) -> bool:
        """Looks at the files; returns whether `current` is another one now."""
        if self._tls is None:
            return False
        versions = _versions_of(self._tls)
        if versions == self._versions:
            return False
        try:
            made = _credentials(self._tls)
        except ValueError as error:
            self._versions = versions
            _log.warning("the certificates stay as they were: %s", error)
            return False
        if _versions_of(self._tls) != versions:  # what was read may be of both
            return False
        self._versions, self.current = versions, made
        return True


def is_local(target: str) -> bool:
    """Returns whether what is sent to a target, as gRPC writes it, stays on this host."""
    scheme, colon, rest = target.partition(":")
    if scheme in {"unix", "unix-abstract"}:
        return True
    if colon and scheme in {"dns", "ipv4", "ipv6"}:
        target = rest.rpartition("/")[2]
    return all(_is_loopback(address) for address in target.split(","))


def _is_loopback(address: str) -> bool:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        host = address
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    """Reads the files. Raises ValueError."""
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca = key = cert = None
    try:
        if tls.ca is not None:
            check.load_verify_locations(tls.ca)
            ca = Path(tls.ca).read_bytes()
        if tls.cert is not None and tls.key is not None:
            # Without a password OpenSSL asks the terminal for one.
            check.load_cert_chain(tls.cert, tls.key, password="")
            cert, key = Path(tls.cert).read_bytes(), Path(tls.key).read_bytes()
    except OSError as error:  # of which ssl.SSLError is one
        files = ", ".join(map(str, tls.files))
        raise ValueError(f"{files} cannot be used for TLS: {error}") from error
    return grpc.ssl_channel_credentials(ca, key, cert)


def _read_token(token: Token) -> str:
    if isinstance(token, str):
        return token
    try:
        text = Path(token).read_text(encoding="ascii").strip()
        _check_token(text)
    except (OSError, ValueError) as error:
        raise AccessDenied(
            f"there is no token in {os.fspath(token)}: {error}",
            code=grpc.StatusCode.UNAUTHENTICATED,
        ) from error
    return text


def _check_token(token: str) -> None:
    """Raises ValueError, without the token, for what cannot be sent."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"a token of {len(token)} characters has others than visible ones of ASCII, or none"
        )


def _versions_of(tls: TLS | None) -> _Versions:
    """Returns what differs when a file is written, replaced, linked elsewhere, made or removed."""
    return () if tls is None else tuple(_version(path) for path in tls.files)


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
