"""TLS between real channels and a real server, with certificates that come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import serialization

from tests.certificates import CA, Issued, put
from tests.front.fake_core import FakeCore
from tests.front.harness import Front, until
from tests.front.secured import generate, refused, secured, trusting
from tokenloom.scheduler.config import ConfigError
from tokenloom.scheduler.front import server as server_module

ID = "spiffe://example.org/ns/search/sa/api"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Place:
    """The files of a server that knows clients by the certificates of a CA."""

    def __init__(self, folder: Path) -> None:
        self.ca, self.client_ca = CA("servers"), CA("clients")
        self.client = self.client_ca.client(ID)
        self.folder = folder
        self.rotate(self.ca.server())
        put(folder / "clients.pem", self.client_ca.pem)

    def rotate(self, issued: Issued) -> None:
        """Writes one file after the other, so that for a moment they do not match."""
        issued.write(self.folder, "server")

    @property
    def tls(self) -> dict[str, str]:
        return {
            "tls_cert": str(self.folder / "server.pem"),
            "tls_key": str(self.folder / "server.key"),
        }

    @property
    def mutual(self) -> dict[str, str]:
        return self.tls | {"tls_client_ca": str(self.folder / "clients.pem")}

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        return trusting(self.ca, client=self.client)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
async def mutual(
    core: FakeCore, run_dir: Path, checkpoint: Path, place: Place
) -> AsyncIterator[Front]:
    """A front that wants to see certificates."""
    async with secured(
        core, run_dir, checkpoint, place.mutual, credentials=place.credentials
    ) as front:
        yield front


async def status_of(call: AsyncIterable[object]) -> grpc.StatusCode:
    """Reads a call to its end."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_streams_come_over_tls(
    core: FakeCore, run_dir: Path, checkpoint: Path, place: Place
) -> None:
    only_server = trusting(place.ca)
    async with secured(core, run_dir, checkpoint, place.tls, credentials=only_server) as front:
        assert (await front.generate([50], max_tokens=9)).token_ids == [50] * 9
        assert (await generate(front.server.address, only_server)).finish is not None


async def test_strangers_do_not_come_as_far_as_a_call(mutual: Front, place: Place) -> None:
    strangers = CA("strangers")
    late = place.client_ca.client(ID, lasts=timedelta(hours=-1))
    cases = {
        "plaintext": None,
        "no certificate": trusting(place.ca),
        "another CA's certificate": trusting(place.ca, client=strangers.client(ID)),
        "an expired certificate": trusting(place.ca, client=late),
        "a certificate of the CA of servers": trusting(place.ca, client=place.ca.client(ID)),
    }
    for name, credentials in cases.items():
        found = await refused(mutual.server.address, credentials)
        assert (found.code, found.info.reason) == (UNAVAILABLE, ""), name
    assert mutual.core.submits == []
    assert (await mutual.generate([50], max_tokens=3)).token_ids == [50] * 3


@pytest.mark.parametrize("what", ["another CA", "another name", "expired"])
async def test_clients_do_not_talk_to_a_false_server(
    core: FakeCore, run_dir: Path, checkpoint: Path, place: Place, what: str
) -> None:
    async with secured(
        core, run_dir, checkpoint, place.tls, credentials=trusting(place.ca)
    ) as front:
        match what:
            case "another CA":
                place.rotate(CA("strangers").server())
            case "another name":
                place.rotate(place.ca.issue([]))
            case "expired":
                place.rotate(place.ca.server(lasts=timedelta(hours=-1)))
        found = await refused(front.server.address, trusting(place.ca))
        assert found.code is UNAVAILABLE
        assert core.submits == []


async def test_certificates_change_under_load_and_no_stream_fails(
    mutual: Front, place: Place
) -> None:
    """Server's certificate, its CA and the CA of clients: each is exchanged in two steps."""
    address = mutual.server.address
    mutual.core.pause_after = 3
    long = [asyncio.create_task(mutual.generate([50], max_tokens=200)) for _ in range(4)]
    await until(lambda: mutual.core.num_running == len(long))
    new_ca, new_client_ca = CA("servers, new"), CA("clients, new")
    new_client = new_client_ca.client(ID)
    trust = [place.ca]
    client = place.client
    num_done = [0] * 4
    done = asyncio.Event()

    async def keep_calling(caller: int) -> None:
        """Reads streams, each over a new connection. One that fails fails the test."""
        while not done.is_set():
            completion = await generate(address, trusting(*trust, client=client), max_tokens=2)
            assert len(completion.token_ids) == 2
            num_done[caller] += 1

    async def some_calls() -> None:
        """Waits until no caller is busy with what it began before."""
        before = list(num_done)
        await until(
            lambda: all(now >= then + 2 for now, then in zip(num_done, before, strict=True))
        )

    async with asyncio.TaskGroup() as group:
        for caller in range(len(num_done)):
            group.create_task(keep_calling(caller))
        await some_calls()
        for _ in range(5):  # renewals
            place.rotate(place.ca.server())
            await some_calls()
        put(place.folder / "clients.pem", place.client_ca.pem + new_client_ca.pem)
        await some_calls()
        client = new_client
        trust.append(new_ca)
        await some_calls()
        put(place.folder / "clients.pem", new_client_ca.pem)
        place.rotate(new_ca.server())
        await some_calls()
        trust.remove(place.ca)
        await some_calls()
        done.set()
    mutual.core.pause_after = None
    for task in long:
        assert (await task).token_ids == [50] * 200
    assert (await refused(address, place.credentials)).code is UNAVAILABLE


@pytest.mark.parametrize("broken", ["mismatch", "garbage", "absent", "open to others"])
async def test_files_that_cannot_be_used_leave_the_old_ones_in_force(
    mutual: Front, place: Place, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    address = mutual.server.address
    match broken:
        case "mismatch":
            put(place.folder / "server.pem", place.ca.server().cert)
        case "garbage":
            put(place.folder / "clients.pem", b"no certificate")
        case "absent":
            (place.folder / "server.key").unlink()
        case "open to others":
            (place.folder / "server.key").chmod(0o644)
            put(place.folder / "server.pem", (place.folder / "server.pem").read_bytes())
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await generate(address, place.credentials)
    assert caplog.text.count("the certificates stay as they were") == 1
    assert str(place.folder) in caplog.text
    mended = CA("mended")
    place.rotate(mended.server())
    put(place.folder / "clients.pem", place.client_ca.pem)
    assert (await generate(address, trusting(mended, client=place.client))).finish is not None


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("mismatch", "KEY_VALUES_MISMATCH"),
        ("absent", "No such file"),
        ("garbage", "cannot be used for TLS"),
        ("open to others", "has mode 644; it must be 600"),
        ("encrypted", "cannot be used for TLS"),
    ],
)
async def test_a_server_does_not_start_with_files_that_cannot_be_used(
    core: FakeCore, run_dir: Path, checkpoint: Path, place: Place, broken: str, told: str
) -> None:
    key = place.folder / "server.key"
    match broken:
        case "mismatch":
            put(place.folder / "server.pem", place.ca.server().cert)
        case "absent":
            key.unlink()
        case "garbage":
            put(place.folder / "clients.pem", b"no certificate")
        case "open to others":
            key.chmod(0o644)
        case "encrypted":
            loaded = serialization.load_pem_private_key(key.read_bytes(), None)
            encrypted = loaded.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"a password"),
            )
            put(key, encrypted)
    with pytest.raises(ConfigError, match=told):
        async with secured(core, run_dir, checkpoint, place.mutual, credentials=place.credentials):
            pass


async def test_a_client_that_is_not_trusted_any_more_keeps_its_streams_and_gets_no_new_ones(
    core: FakeCore,
    run_dir: Path,
    checkpoint: Path,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "CONNECTION_AGE_MS", 500)
    async with secured(
        core, run_dir, checkpoint, place.mutual, credentials=place.credentials
    ) as front:
        core.pause_after = 3
        long = asyncio.create_task(front.generate([50], max_tokens=200))
        await until(lambda: core.num_running == 1)
        put(place.folder / "clients.pem", CA("clients, new").pem)
        ended = grpc.StatusCode.OK
        while ended is grpc.StatusCode.OK:  # until its connection is too old
            ended = await status_of(front.stub.Generate(front.request([51], max_tokens=1)))
        assert ended is UNAVAILABLE
        assert not long.done()
        core.pause_after = None
        assert (await long).token_ids == [50] * 200
        again = front.stub.Generate(front.request([51], max_tokens=1))
        assert await status_of(again) is UNAVAILABLE
