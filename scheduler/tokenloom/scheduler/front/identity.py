"""Whose call it is: from the connection and its metadata, never from the request.

a bearer token        decides, where there is one: a caller with a certificate can act for
                      another tenant whose token it has, and a wrong token is refused
a client certificate  by its SPIFFE id, which is in the file or else nobody's
neither               the file's anonymous tenant, if it names one
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, TypeAlias

import grpc.aio

from tokenloom.scheduler.front.errors import Unauthenticated, UnknownTenant
from tokenloom.scheduler.tenants import NOBODY, Tenant, Tenants, TenantsFile

_LOOK_EVERY_S = 1.0
_SPIFFE_ID = "peer_spiffe_id"
"""Told by gRPC for a verified certificate with exactly one URI, which is a SPIFFE id."""

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Identities:
    """Tells the tenant of each call."""

    def __init__(self, file: TenantsFile | None) -> None:
        """None: everybody may call, and is nobody in particular."""
        self._file = file

    def tenant_of(self, context: _Context) -> Tenant:
        """Returns whose call it is. Raises Unauthenticated or UnknownTenant."""
        if self._file is None:
            return NOBODY
        return tenant_of(
            self._file.tenants,
            authorization=[
                value
                for key, value in context.invocation_metadata() or ()
                if key == "authorization"
            ],
            spiffe_id=_first(context.auth_context().get(_SPIFFE_ID, ())),
        )

    async def follow(self) -> None:
        """Reads the file again when it changes, until it is cancelled."""
        while self._file is not None:
            await asyncio.sleep(_LOOK_EVERY_S)
            await asyncio.to_thread(self._file.refresh)


def tenant_of(
    tenants: Tenants, *, authorization: list[str | bytes], spiffe_id: str | None
) -> Tenant:
    """Returns whose a call is by what came with it. Raises Unauthenticated or UnknownTenant."""
    if authorization:
        tenant = _bearer(tenants, authorization)
        if tenant is None:
            raise Unauthenticated(
                "BAD_TOKEN", "the authorization is no `Bearer TOKEN` that this server knows"
            )
        return tenant
    if spiffe_id is not None:
        tenant = tenants.with_spiffe_id(spiffe_id)
        if tenant is None:
            raise UnknownTenant(spiffe_id)
        return tenant
    if tenants.anonymous is None:
        raise Unauthenticated(
            "NO_IDENTITY",
            "this server serves its tenants only: send a bearer token, or a client certificate "
            "with a SPIFFE id",
        )
    return tenants.anonymous


def _bearer(tenants: Tenants, authorization: list[str | bytes]) -> Tenant | None:
    """Returns whose token it is. Several of them are none: who knows which one counts elsewhere."""
    match authorization:
        case [str(value)]:
            scheme, _, token = value.partition(" ")
            return tenants.with_token(token.strip()) if scheme.lower() == "bearer" else None
        case _:
            return None


def _first(values: Iterable[bytes]) -> str | None:
    return next((value.decode(errors="replace") for value in values), None)
