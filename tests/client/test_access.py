"""How clients prove themselves and what they trust, over real TLS, with files that change."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from tests.certificates import CA, put
from tests.client.scripted import (
    ScriptedServer,
    admission,
    delta,
    finish,
    hello,
    serving,
)
from tokenloom.client import TLS, AccessDenied, AsyncClient, Cancelled, Client, Unavailable
from tokenloom.client.access import Access, is_local
from tokenloom.v1 import inference_pb2 as pb

OLD_ID, NEW_ID = "spiffe://example.org/old", "spiffe://example.org/new"
TOKEN = "a-token"


class Place:
    """A CA, a server with its certificate, and a client's files."""

    def __init__(self, folder: Path) -> None:
        self.ca = CA("servers")
        self.client_ca = CA("clients")
        self.server = self.ca.server()
        self.folder = folder
        self.trusted = put(folder / "ca.pem", self.ca.pem)
        self.rotate(OLD_ID)

    def rotate(self, spiffe_id: str) -> None:
        self.cert, self.key = self.client_ca.client(spiffe_id).write(self.folder, "client")

    @property
    def tls(self) -> TLS:
        return TLS(ca=self.trusted, cert=self.cert, key=self.key)

    @property
    def server_credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.server.key, self.server.cert)],
            self.client_ca.pem,
            require_client_auth=True,
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Seen:
    """What a server sees of its callers."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.authorizations: list[str | bytes | None] = []
        self.go_on = threading.Event()

    def note(self, context: grpc.ServicerContext) -> None:
        ids: Any = context.auth_context().get("peer_spiffe_id", ())  # its stubs say int
        self.ids += [each.decode() for each in ids]
        self.authorizations.append(dict(context.invocation_metadata()).get("authorization"))

    def hello(self, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.note(context)
        yield from hello(context)

    def slow(self, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        """A token, and the second when the test says."""
        self.note(context)
        yield admission()
        yield delta(0, 1, text="a")
        assert self.go_on.wait(60)
        yield delta(1, 2, text="b")
        yield finish(2)


@contextmanager
def secured(place: Place, seen: Seen) -> Iterator[ScriptedServer]:
    with serving(seen.hello, credentials=place.server_credentials) as server:
        yield server


# TLS ----------------------------------------------------------------------------------------


def test_a_client_shows_its_certificate_and_its_token(place: Place) -> None:
    seen = Seen()
    with secured(place, seen) as server:
        with Client(server.address, credentials=place.tls, token=TOKEN) as client:
            client.wait_ready(timeout_s=60)
            assert client.generate("a").text() == "Hello"
            assert client.tokenize("ab") == [97, 98]
            assert client.model().name == "scripted"
        with Client(server.address, credentials=place.tls) as client:
            assert client.generate("a").text() == "Hello"
    assert seen.ids == [OLD_ID] * 2
    assert seen.authorizations == [f"Bearer {TOKEN}", None]


async def test_an_async_client_shows_its_certificate_and_its_token(place: Place) -> None:
    seen = Seen()
    with secured(place, seen) as server:
        async with AsyncClient(server.address, credentials=place.tls, token=TOKEN) as client:
            await client.wait_ready(timeout_s=60)
            assert await client.generate("a").text() == "Hello"
            assert await client.tokenize("ab") == [97, 98]
    assert seen.ids == [OLD_ID]
    assert seen.authorizations == [f"Bearer {TOKEN}"]


def test_a_server_of_another_ca_or_name_is_not_talked_to(place: Place, tmp_path: Path) -> None:
    seen = Seen()
    other = put(tmp_path / "other.pem", CA("strangers").pem)
    strangers = (
        TLS(ca=other, cert=place.cert, key=place.key),
        TLS(ca=place.trusted, cert=place.cert, key=place.key, server_name="models.example.org"),
        TLS(cert=place.cert, key=place.key),  # the well-known CAs
    )
    with secured(place, seen) as server:
        for tls in strangers:
            client = Client(server.address, credentials=tls, token=TOKEN, resume=None)
            with client, pytest.raises(Unavailable):
                client.generate("a").text()
    assert seen.authorizations == []


def test_the_name_in_the_certificate_can_be_another_than_the_address(place: Place) -> None:
    place.server = place.ca.issue([x509.DNSName("models.example.org")])
    with secured(place, Seen()) as server:
        named = replace(place.tls, server_name="models.example.org")
        with Client(server.address, credentials=named) as client:
            assert client.generate("a").text() == "Hello"
        client = Client(server.address, credentials=place.tls, resume=None)
        with client, pytest.raises(Unavailable):
            client.generate("a").text()


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda place: TLS(ca=place.folder / "none.pem"), "none.pem"),
        (lambda place: TLS(ca=place.key), "client.key"),
        (lambda place: TLS(cert=place.trusted, key=place.key), "KEY_VALUES_MISMATCH"),
    ],
)
def test_files_that_cannot_be_used_are_told_when_a_client_is_made(
    place: Place, broken: Callable[[Place], TLS], told: str
) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=told):
            kind("localhost:1", credentials=broken(place))


def test_a_certificate_goes_with_its_key() -> None:
    for cert, key in (("a.pem", None), (None, "a.key")):
        with pytest.raises(ValueError, match="needs cert and key, or neither"):
            TLS(cert=cert, key=key)


# Files that change --------------------------------------------------------------------------


def test_new_calls_have_the_new_certificate_and_running_ones_go_on(place: Place) -> None:
    seen = Seen()
    with (
        secured(place, seen) as server,
        Client(server.address, credentials=place.tls) as client,
    ):
        server.respond = seen.slow
        running = client.generate("a")
        running.admission()
        place.rotate(NEW_ID)
        server.respond = seen.hello
        for _ in range(3):
            assert client.generate("a").text() == "Hello"
        channel = client._transport._channel  # type: ignore[attr-defined]
        assert len(channel._retired) == 1
        seen.go_on.set()
        assert running.text() == "ab"
        while channel._retired:  # closed by a call that finds it idle
            assert client.generate("a").text() == "Hello"
    assert seen.ids[:2] == [OLD_ID, NEW_ID]
    assert set(seen.ids[1:]) == {NEW_ID}


async def test_new_async_calls_have_the_new_certificate_and_running_ones_go_on(
    place: Place,
) -> None:
    seen = Seen()
    with secured(place, seen) as server:
        async with AsyncClient(server.address, credentials=place.tls) as client:
            server.respond = seen.slow
            running = client.generate("a")
            await running.admission()
            place.rotate(NEW_ID)
            server.respond = seen.hello
            for _ in range(3):
                assert await client.generate("a").text() == "Hello"
            channel = client._transport._channel()  # type: ignore[attr-defined]
            assert len(channel._retired) == 1
            seen.go_on.set()
            assert await running.text() == "ab"
            while channel._retired:
                await asyncio.sleep(0.01)
    assert seen.ids == [OLD_ID, NEW_ID, NEW_ID, NEW_ID]


def rotate_under_load(place: Place, num_done: list[int], done: threading.Event) -> None:
    """Exchanges a client's files again and again while it makes calls."""
    while not all(num_done):
        assert not done.wait(0.001)
    for _ in range(8):
        before = sum(num_done)
        place.rotate(NEW_ID)
        while sum(num_done) < before + 8:
            assert not done.wait(0.001)
    done.set()


def test_a_client_that_is_closed_opens_nothing_for_new_certificates(place: Place) -> None:
    with secured(place, Seen()) as server:
        client = Client(server.address, credentials=place.tls)
        assert client.generate("a").text() == "Hello"
        client.close()
        place.rotate(NEW_ID)
        with pytest.raises(Cancelled, match="the client is closed"):
            client.generate("a").text()


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_files_change_under_load_and_no_stream_fails(place: Place, kind: str) -> None:
    seen = Seen()
    done = threading.Event()
    num_done = [0] * 4

    def read(client: Client, caller: int) -> None:
        while not done.is_set():
            assert client.generate("a").text() == "Hello"
            num_done[caller] += 1

    async def read_async(client: AsyncClient, caller: int) -> None:
        while not done.is_set():
            assert await client.generate("a").text() == "Hello"
            num_done[caller] += 1

    async def read_all(address: str) -> None:
        async with (
            AsyncClient(address, credentials=place.tls, resume=None) as client,
            asyncio.TaskGroup() as group,
        ):
            for caller in range(len(num_done)):
                group.create_task(read_async(client, caller))

    with secured(place, seen) as server, ThreadPoolExecutor(8) as threads:
        try:
            rotating = threads.submit(rotate_under_load, place, num_done, done)
            if kind == "asyncio":
                asyncio.run(read_all(server.address))
            else:
                with Client(server.address, credentials=place.tls, resume=None) as client:
                    reading = [
                        threads.submit(read, client, caller) for caller in range(len(num_done))
                    ]
                    for each in reading:
                        each.result()
            rotating.result()
        finally:
            done.set()
    assert NEW_ID in seen.ids


def test_new_files_that_cannot_be_used_leave_the_old_ones_in_use(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    with (
        secured(place, seen) as server,
        Client(server.address, credentials=place.tls) as client,
    ):
        assert client.generate("a").text() == "Hello"
        put(place.cert, b"half a certificate")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert client.generate("a").text() == "Hello"
        assert caplog.text.count("the certificates stay as they were") == 1
        place.rotate(NEW_ID)
        assert client.generate("a").text() == "Hello"
    assert seen.ids == [OLD_ID] * 4 + [NEW_ID]


def test_a_token_in_a_file_is_the_one_that_is_there_now(tmp_path: Path) -> None:
    seen = Seen()
    file = put(tmp_path / "token", b"first\n")
    with serving(seen.hello) as server, Client(server.address, token=file) as client:
        assert client.generate("a").text() == "Hello"
        put(file, b"  second  \n")
        assert client.generate("a").text() == "Hello"
        for broken in (b"", b"two words", b"\xff", b"a\x00b"):
            put(file, broken)
            with pytest.raises(AccessDenied, match="there is no token in") as caught:
                client.generate("a").text()
            assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
        file.unlink()
        with pytest.raises(AccessDenied, match="No such file"):
            client.tokenize("a")
        put(file, b"third")
        assert client.generate("a").text() == "Hello"
    assert seen.authorizations == ["Bearer first", "Bearer second", "Bearer third"]


# Where a token may go -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:50051", True),
        ("localhost", True),
        ("127.0.0.1:50051", True),
        ("127.8.9.1:1", True),
        ("[::1]:50051", True),
        ("unix:/run/server.sock", True),
        ("unix:///run/server.sock", True),
        ("unix-abstract:name", True),
        ("dns:localhost:50051", True),
        ("dns:///localhost:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", True),
        ("ipv6:[::1]:1", True),
        ("10.0.0.1:50051", False),
        ("models:50051", False),
        ("models.example.org", False),
        ("localhost.example.org:1", False),
        ("0.0.0.0:50051", False),
        ("dns:///models:50051", False),
        ("dns://127.0.0.1/models:50051", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("ipv6:[2001:db8::1]:1", False),
        ("xds:///models", False),
        ("", False),
    ],
)
def test_a_token_goes_to_other_hosts_encrypted_or_on_purpose(target: str, local: bool) -> None:
    assert is_local(target) == local
    for kind in (Client, AsyncClient):
        if not local:
            with pytest.raises(ValueError, match=r"in plaintext: give credentials=TLS\(…\)"):
                kind(target, token=TOKEN)
        Access(token=TOKEN, insecure=True).check(target)
        Access(token=TOKEN, credentials=TLS()).check(target)
        Access().check(target)


@pytest.mark.parametrize("token", ["", "two words", "line\n", "schlüssel", "\x00"])
def test_what_cannot_be_a_token_is_refused_without_being_told(token: str) -> None:
    with pytest.raises(ValueError, match=f"a token of {len(token)} characters") as caught:
        Client("localhost:1", token=token)
    assert not token or token not in str(caught.value)


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(Access(token=TOKEN))


def test_a_channel_has_its_own_access() -> None:
    with (
        grpc.insecure_channel("localhost:1") as channel,
        pytest.raises(TypeError, match="a channel has its own"),
    ):
        Client(channel, token=TOKEN)
