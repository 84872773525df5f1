"""Who may call, and how much: the tenants file.

    anonymous = "batch"                 # whose a call without an identity is; without it: refused

    [tenants.search]
    weight = 4.0
    max_requests = 64
    spiffe_ids = ["spiffe://example.org/ns/search/sa/api"]

    [tenants.batch]
    tokens_per_minute = 200_000
    token_sha256 = ["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]

The file keeps no secret: of a bearer token it has the SHA-256, which is enough for tokens that are
random numbers of 256 bits (`tokenloom bearer-token` makes them). Several digests of one tenant let
its tokens be exchanged without a gap.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

import msgspec

from tokenloom.scheduler.config import ConfigError
from tokenloom.scheduler.versions import versions_of

MAX_TENANTS = 1000
"""Each is a label of metrics and a counter of the scheduler."""
_MAX_FILE_BYTES = 4 * 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)+")
"""https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md, of workloads"""
_LIMITS = ("max_requests", "max_waiting_requests", "tokens_per_minute", "max_tokens")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """One of those who share the server."""

    name: str
    weight: float = 1.0
    """Its share beside others' when there is too much to do."""
    max_requests: int | None = None
    """That run or wait at once; None: as many as the server takes. So for those below."""
    max_waiting_requests: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and completions."""
    max_tokens: int | None = None
    """Of one completion."""
    cache_group: str = ""
    """Tenants with the same one find each other's cached prompts; empty: the tenant's own name."""
    spiffe_ids: tuple[str, ...] = ()
    """In its clients' certificates."""
    token_sha256: tuple[str, ...] = ()
    """Of its bearer tokens, in hexadecimal."""

    def __post_init__(self) -> None:
        if not self.cache_group:
            object.__setattr__(self, "cache_group", self.name)


_FIELDS = {each.name for each in fields(Tenant)} - {"name"}


NOBODY = Tenant(name="")
"""Whose all calls are where there is no tenants file."""


@dataclass(frozen=True, kw_only=True)
class Tenants:
    """What one version of the file says."""

    by_name: Mapping[str, Tenant]
    anonymous: Tenant | None = None
    """Whose calls without an identity are; None: they are refused."""
    _by_digest: Mapping[str, Tenant] = field(init=False, repr=False, compare=False)
    _by_spiffe_id: Mapping[str, Tenant] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, of_tenant in (("_by_digest", "token_sha256"), ("_by_spiffe_id", "spiffe_ids")):
            object.__setattr__(self, name, _index(self.by_name, of_tenant))

    @classmethod
    def read(cls, path: Path) -> Tenants:
        """Reads the file. Raises ConfigError."""
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
            if len(data) > _MAX_FILE_BYTES:
                raise ConfigError(f"it has more than {_MAX_FILE_BYTES} bytes")
            return cls.parse(data.decode())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"tenants file {path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Tenants:
        """Returns what a file's text says. Raises ValueError."""
        document = tomllib.loads(text)
        if unknown := document.keys() - {"anonymous", "tenants"}:
            raise ConfigError(f"there is no {_listed(unknown)}; it has anonymous and tenants")
        tables = document.get("tenants", {})
        if not isinstance(tables, dict) or not 0 < len(tables) <= MAX_TENANTS:
            raise ConfigError(f"tenants must be 1 to {MAX_TENANTS} tables")
        by_name = {name: _tenant(name, table) for name, table in tables.items()}
        anonymous = document.get("anonymous")
        if anonymous is not None and anonymous not in by_name:
            raise ConfigError(f"anonymous is {anonymous!r}, which is no tenant")
        return cls(
            by_name=MappingProxyType(by_name),
            anonymous=None if anonymous is None else by_name[anonymous],
        )

    def with_token(self, token: str) -> Tenant | None:
        """Returns whose bearer token it is.

        How long the look-up takes depends on the digest alone, which tells nothing of a token.
        """
        return self._by_digest.get(digest_of_token(token))

    def with_spiffe_id(self, spiffe_id: str) -> Tenant | None:
        """Returns whose certificates have this name."""
        return self._by_spiffe_id.get(spiffe_id)


class TenantsFile:
    """The tenants as the file has them, read again when it changes.

    A new version that cannot be used is logged, and the one before stays in force.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._versions = versions_of(path)
        self.tenants = Tenants.read(path)

    def refresh(self) -> bool:
        """Looks at the file; returns whether the tenants are others now."""
        versions = versions_of(self._path)
        if versions == self._versions:
            return False
        self._versions = versions
        try:
            read = Tenants.read(self._path)
        except ConfigError as error:
            _log.error("the tenants stay as they were: %s", error)
            return False
        if read == self.tenants:
            return False
        self.tenants = read
        _log.info("%s has %d tenants", self._path, len(read.by_name))
        return True


def digest_of_token(token: str) -> str:
    """Returns what the tenants file has of a bearer token."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


def _tenant(name: str, table: object) -> Tenant:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no tenant's name; it must match {_NAME.pattern}")
    where = f"tenants.{name}"
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table")
    if unknown := table.keys() - _FIELDS:
        known = _listed(_FIELDS)
        raise ConfigError(f"{where} has no {_listed(unknown)}; it has {known}")
    try:
        tenant = msgspec.convert({**table, "name": name}, Tenant)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
    _check(tenant, where)
    return tenant


def _check(tenant: Tenant, where: str) -> None:
    if not 0 < tenant.weight < math.inf:
        raise ConfigError(f"{where}.weight is {tenant.weight}; it must be a positive number")
    for limit in _LIMITS:
        value = getattr(tenant, limit)
        if value is not None and value < 1:
            raise ConfigError(f"{where}.{limit} is {value}; it must be at least 1")
    if not _NAME.fullmatch(tenant.cache_group):
        raise ConfigError(f"{where}.cache_group is {tenant.cache_group!r}; names are shorter words")
    for digest in tenant.token_sha256:
        if not _DIGEST.fullmatch(digest):
            # Not quoted: somebody may have put the token itself there.
            raise ConfigError(
                f"{where}.token_sha256 has an entry of {len(digest)} characters; each must be a "
                "SHA-256 of 64 small hexadecimal digits, which `tokenloom bearer-token` tells"
            )
    for spiffe_id in tenant.spiffe_ids:
        if not _SPIFFE_ID.fullmatch(spiffe_id):
            raise ConfigError(
                f"{where}.spiffe_ids has {spiffe_id!r}; it must be spiffe://HOST/PATH"
            )


def _index(by_name: Mapping[str, Tenant], of_tenant: str) -> dict[str, Tenant]:
    """Returns the tenant of each identity. Raises ConfigError if one has two."""
    found: dict[str, Tenant] = {}
    for tenant in by_name.values():
        for identity in getattr(tenant, of_tenant):
            if (other := found.setdefault(identity, tenant)) is not tenant:
                raise ConfigError(
                    f"{other.name} and {tenant.name} have the same entry in {of_tenant}: "
                    "a caller is one tenant"
                )
    return found


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
