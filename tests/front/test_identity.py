"""Whose a call is, over real connections: certificates, bearer tokens, and a file that changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.certificates import CA, put
from tests.front.fake_core import FakeCore
from tests.front.harness import Front, refusal, refusal_of, until
from tests.front.secured import Metadata, generate, refused, secured, trusting
from tokenloom.scheduler.bearer import new_token
from tokenloom.scheduler.front import identity
from tokenloom.scheduler.front.errors import RequestError
from tokenloom.scheduler.front.identity import tenant_of
from tokenloom.scheduler.tenants import Tenants, digest_of_token
from tokenloom.v1 import inference_pb2 as pb

SEARCH, BATCH = new_token(), new_token()
SEARCH_ID = "spiffe://example.org/ns/search/sa/api"
STRANGER_ID = "spiffe://example.org/ns/other/sa/api"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def tenants_text(*, anonymous: str = "", **tokens: str) -> str:
    tables = [f'anonymous = "{anonymous}"'] if anonymous else []
    for name, token in tokens.items():
        tables += [f"[tenants.{name}]", f'token_sha256 = ["{digest_of_token(token)}"]']
        if name == "search":
            tables.append(f'spiffe_ids = ["{SEARCH_ID}"]')
    return "\n".join(tables)


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(tenants_text(search=SEARCH, batch=BATCH))
    return path


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at files often."""
    monkeypatch.setattr(identity, "_LOOK_EVERY_S", 0.01)


@pytest.fixture
async def guarded(
    core: FakeCore, run_dir: Path, checkpoint: Path, path: Path
) -> AsyncIterator[Front]:
    """A front that serves tenants only, in plaintext on this host."""
    async with secured(core, run_dir, checkpoint, {"tenants": str(path)}) as front:
        yield front


# What decides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("authorization", "spiffe_id", "anonymous", "expected"),
    [
        ([f"Bearer {SEARCH}"], None, "", "search"),
        ([f"bearer {BATCH}"], None, "", "batch"),
        ([f"Bearer  {BATCH} "], None, "", "batch"),
        ([], SEARCH_ID, "", "search"),
        ([f"Bearer {BATCH}"], SEARCH_ID, "", "batch"),  # it holds the token of another
        ([f"Bearer {BATCH}"], STRANGER_ID, "", "batch"),
        ([], None, "batch", "batch"),
        ([], None, "", "NO_IDENTITY"),
        ([], STRANGER_ID, "batch", "UNKNOWN_TENANT"),
        # A wrong token never falls back to anything.
        (["Bearer wrong"], SEARCH_ID, "batch", "BAD_TOKEN"),
        (["Bearer "], None, "batch", "BAD_TOKEN"),
        (["Bearer"], None, "batch", "BAD_TOKEN"),
        ([""], None, "batch", "BAD_TOKEN"),
        ([SEARCH], None, "batch", "BAD_TOKEN"),
        ([f"Basic {SEARCH}"], None, "batch", "BAD_TOKEN"),
        ([f"Bearer {digest_of_token(SEARCH)}"], None, "batch", "BAD_TOKEN"),
        ([f"Bearer {SEARCH}, Bearer {BATCH}"], None, "batch", "BAD_TOKEN"),
        ([f"Bearer {SEARCH}", f"Bearer {SEARCH}"], None, "batch", "BAD_TOKEN"),
        ([f"Bearer {SEARCH}".encode()], None, "batch", "BAD_TOKEN"),
    ],
)
def test_a_token_decides_then_a_certificate_then_the_file(
    authorization: list[str | bytes], spiffe_id: str | None, anonymous: str, expected: str
) -> None:
    tenants = Tenants.parse(tenants_text(anonymous=anonymous, search=SEARCH, batch=BATCH))
    try:
        found = tenant_of(tenants, authorization=authorization, spiffe_id=spiffe_id).name
    except RequestError as error:
        found = error.reason
    assert found == expected


# Over the wire ------------------------------------------------------------------------------


async def test_the_core_hears_whose_request_it_is(guarded: Front) -> None:
    for token in (SEARCH, BATCH, SEARCH):
        await generate(guarded.server.address, None, metadata=bearer(token))
    assert [submit.tenant for submit in guarded.core.submits] == ["search", "batch", "search"]


async def test_cached_prompts_are_found_within_a_group_of_tenants_alone(
    guarded: Front, path: Path
) -> None:
    shared, own = new_token(), new_token()
    text = tenants_text(search=SEARCH, shared=shared, own=own)
    put(path, text.replace("[tenants.shared]", '[tenants.shared]\ncache_group = "search"').encode())
    guarded.server._identities._file.refresh()  # type: ignore[union-attr]
    for token in (SEARCH, shared, own):
        await generate(guarded.server.address, None, metadata=bearer(token))
    assert [submit.salt for submit in guarded.core.submits] == ["search", "search", "own"]


async def test_without_a_tenants_file_everybody_is_nobody(front: Front) -> None:
    await generate(front.server.address, None)
    await generate(front.server.address, None, metadata=bearer("whatever"))
    assert [(submit.tenant, submit.salt) for submit in front.core.submits] == [("", "")] * 2


async def test_a_caller_without_identity_is_refused_in_every_method(guarded: Front) -> None:
    stub = guarded.stub
    calls: tuple[Awaitable[object], ...] = (
        stub.Tokenize(pb.TokenizeRequest(text="x")),
        stub.Detokenize(pb.DetokenizeRequest(token_ids=[5])),
        stub.GetModel(pb.GetModelRequest()),
    )
    refusals = [await refusal_of(stub.Generate(guarded.request()))]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        refusals.append(refusal(caught.value))
    for found in refusals:
        assert found.code is UNAUTHENTICATED
        assert (found.info.reason, found.info.domain) == ("NO_IDENTITY", "tokenloom")
        assert "bearer token" in found.message
    assert guarded.core.submits == []


async def test_every_method_serves_a_tenant(guarded: Front) -> None:
    metadata = tuple(bearer(BATCH))
    stub = guarded.stub
    assert (await stub.Tokenize(pb.TokenizeRequest(text="x"), metadata=metadata)).token_ids
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=[5]), metadata=metadata)).text
    assert (await stub.GetModel(pb.GetModelRequest(), metadata=metadata)).name == "tiny"


async def test_nothing_is_parsed_for_a_stranger(guarded: Front) -> None:
    raw: Any = guarded.channel.unary_stream("/tokenloom.v1.Inference/Generate")
    found = await refusal_of(raw(b"\xff" * 50))
    assert (found.code, found.info.reason) == (UNAUTHENTICATED, "NO_IDENTITY")
    found = await refusal_of(raw(b"\xff" * 50, metadata=bearer(SEARCH)))
    assert found.info.reason == "MALFORMED"


async def test_a_wrong_token_is_refused_and_not_told_back(guarded: Front) -> None:
    wrong = new_token()
    found = await refused(guarded.server.address, None, metadata=bearer(wrong))
    assert (found.code, found.info.reason) == (UNAUTHENTICATED, "BAD_TOKEN")
    assert wrong not in str(found)


async def test_nothing_that_a_client_writes_about_itself_makes_a_tenant(guarded: Front) -> None:
    """What proxies add is not trusted: anybody can send it."""
    claims = (
        ("x-forwarded-client-cert", f"URI={SEARCH_ID}"),
        ("x-tenant", "search"),
        ("tenant", "search"),
        ("peer_spiffe_id", SEARCH_ID),
    )
    found = await refused(guarded.server.address, None, metadata=claims)
    assert found.info.reason == "NO_IDENTITY"


async def test_health_and_reflection_ask_nobody_for_a_name(guarded: Front) -> None:
    assert await guarded.is_serving()
    assert await guarded.is_serving("liveness")
    channel: Any = guarded.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    assert len(answers) == 1


# With certificates --------------------------------------------------------------------------


async def test_certificates_are_tenants_by_their_spiffe_id(
    core: FakeCore, run_dir: Path, checkpoint: Path, path: Path, tmp_path: Path
) -> None:
    ca, client_ca = CA("servers"), CA("clients")
    cert, key = ca.server().write(tmp_path, "server")
    clients = put(tmp_path / "clients.pem", client_ca.pem)
    search = trusting(ca, client=client_ca.client(SEARCH_ID))
    files = {"tls_cert": cert, "tls_key": key, "tls_client_ca": clients, "tenants": path}
    config = {name: str(value) for name, value in files.items()}
    async with secured(core, run_dir, checkpoint, config, credentials=search) as front:
        address = front.server.address
        await generate(address, search)
        await generate(address, search, metadata=bearer(BATCH))
        assert [submit.tenant for submit in core.submits] == ["search", "batch"]

        stranger = trusting(ca, client=client_ca.client(STRANGER_ID))
        found = await refused(address, stranger)
        assert found.code is grpc.StatusCode.PERMISSION_DENIED
        assert (found.info.reason, found.info.domain) == ("UNKNOWN_TENANT", "tokenloom")
        assert STRANGER_ID in found.message

        # A name in another place, or one of two, is no SPIFFE id.
        two = client_ca.client(SEARCH_ID, STRANGER_ID)
        as_host = client_ca.issue([x509.DNSName(SEARCH_ID)])
        none = client_ca.client()
        for client in (two, as_host, none):
            found = await refused(address, trusting(ca, client=client))
            assert (found.code, found.info.reason) == (UNAUTHENTICATED, "NO_IDENTITY")
        assert len(core.submits) == 2


# A file that changes ------------------------------------------------------------------------


async def test_a_tenant_that_is_removed_keeps_its_streams_and_gets_no_new_ones(
    guarded: Front, path: Path
) -> None:
    metadata = tuple(bearer(SEARCH))

    async def call(max_tokens: int) -> str:
        """Returns why it was refused, empty if it ended well."""
        request = guarded.request([50], max_tokens=max_tokens)
        try:
            async for _ in guarded.stub.Generate(request, metadata=metadata):
                pass
        except grpc.aio.AioRpcError as error:
            return refusal(error).info.reason
        return ""

    guarded.core.pause_after = 3
    running = asyncio.create_task(call(100))
    await until(lambda: guarded.core.num_running == 1)
    put(path, tenants_text(batch=BATCH).encode())
    while not (reason := await call(2)):  # over the same connection
        pass
    assert reason == "BAD_TOKEN"
    assert not running.done()
    guarded.core.pause_after = None
    assert await running == ""
    await generate(guarded.server.address, None, metadata=bearer(BATCH))


async def test_tokens_are_exchanged_under_load_and_no_stream_fails(
    guarded: Front, path: Path
) -> None:
    address = guarded.server.address
    token = SEARCH
    num_done = [0] * 3
    done = asyncio.Event()

    async def keep_calling(caller: int) -> None:
        while not done.is_set():
            await generate(address, None, max_tokens=2, metadata=bearer(token))
            num_done[caller] += 1

    async def some_calls() -> None:
        before = list(num_done)
        await until(lambda: all(now > then + 1 for now, then in zip(num_done, before, strict=True)))

    async def is_known(other: str) -> None:
        while True:
            try:
                await generate(address, None, max_tokens=1, metadata=bearer(other))
            except grpc.aio.AioRpcError:
                continue
            return

    async with asyncio.TaskGroup() as group:
        for caller in range(len(num_done)):
            group.create_task(keep_calling(caller))
        for _ in range(3):
            new = new_token()
            digests = f'["{digest_of_token(token)}", "{digest_of_token(new)}"]'
            put(path, f"[tenants.search]\ntoken_sha256 = {digests}".encode())
            await is_known(new)
            await some_calls()
            token = new
            await some_calls()
            put(path, tenants_text(search=new).encode())
            await some_calls()
        done.set()
    assert {submit.tenant for submit in guarded.core.submits} == {"search"}
    assert (await refused(address, None, metadata=bearer(SEARCH))).info.reason == "BAD_TOKEN"


async def test_a_broken_new_file_changes_nobodys_access(
    guarded: Front, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = guarded.server.address
    put(path, b"[tenants.search]\nweight = -1")
    await until(lambda: "stay as they were" in caplog.text)
    await generate(address, None, metadata=bearer(SEARCH))
    await generate(address, None, metadata=bearer(BATCH))
    assert (await refused(address, None)).info.reason == "NO_IDENTITY"
    assert SEARCH not in caplog.text
