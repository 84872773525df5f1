"""Real processes with TLS and tenants: several fronts, the core, and the commands of a client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.certificates import CA, put
from tests.e2e.server import START_TIMEOUT_S, Server
from tokenloom.client import TLS, AccessDenied, Client
from tokenloom.client.errors import Unavailable
from tokenloom.scheduler.bearer import new_token
from tokenloom.scheduler.tenants import digest_of_token

POCKET = Path(__file__).parents[2] / "models" / "pocket"
ID = "spiffe://example.org/ns/search/sa/api"
TOKEN = new_token()


@dataclass(frozen=True, kw_only=True)
class Place:
    """A server that wants certificates, and what a client has."""

    server: Server
    ca: CA
    folder: Path
    tls: TLS

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the client over TLS."""
        return subprocess.run(
            [
                *(sys.executable, "-m", "tokenloom.client", *arguments),
                *(f"--tls-ca={self.tls.ca}", f"--tls-cert={self.tls.cert}"),
                f"--tls-key={self.tls.key}",
            ],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("secured")
    ca, client_ca = CA("servers"), CA("clients")
    ca.server().write(folder, "server")
    client_ca.client(ID).write(folder, "client")
    put(folder / "ca.pem", ca.pem)
    put(folder / "clients.pem", client_ca.pem)
    text = f"""
        [tenants.search]
        spiffe_ids = ["{ID}"]
        [tenants.batch]
        token_sha256 = ["{digest_of_token(TOKEN)}"]
    """
    put(folder / "tenants.toml", text.encode())
    options = (
        "--num-fronts=2",
        f"--tls-cert={folder / 'server.pem'}",
        f"--tls-key={folder / 'server.key'}",
        f"--tls-client-ca={folder / 'clients.pem'}",
        f"--tenants={folder / 'tenants.toml'}",
    )
    with Server.of_fake(POCKET, *options) as server:
        tls = TLS(ca=folder / "ca.pem", cert=folder / "client.pem", key=folder / "client.key")
        server.client(credentials=tls).close()
        yield Place(server=server, ca=ca, folder=folder, tls=tls)
        server.assert_unharmed()


def test_all_fronts_of_a_server_speak_tls_and_read_new_certificates(place: Place) -> None:
    def call(tls: TLS) -> None:
        with Client(place.server.address, credentials=tls, resume=None) as client:
            client.wait_ready(timeout_s=START_TIMEOUT_S)
            assert len(client.generate("a", max_tokens=3, ignore_eos=True).result().token_ids) == 3

    for _ in range(8):  # connections fall on both
        call(place.tls)
    renewed = CA("servers, renewed")
    renewed.server().write(place.folder, "server")
    both = put(place.folder / "both.pem", place.ca.pem + renewed.pem)
    only_new = put(place.folder / "new.pem", renewed.pem)
    trusted = {}
    for name, ca in (("both", both), ("new", only_new)):
        trusted[name] = TLS(ca=ca, cert=place.tls.cert, key=place.tls.key)
    for _ in range(8):
        call(trusted["both"])
        call(trusted["new"])
    old = Client(place.server.address, credentials=place.tls, resume=None)
    with old, pytest.raises(Unavailable):
        old.generate("a").text()
    place.ca.server().write(place.folder, "server")
    call(place.tls)


def test_a_wrong_token_is_refused_by_every_front(place: Place) -> None:
    for _ in range(4):
        client = Client(place.server.address, credentials=place.tls, token="wrong")
        with client, pytest.raises(AccessDenied) as caught:
            client.generate("a").text()
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert caught.value.reason == "BAD_TOKEN"


def test_the_commands_of_a_client_speak_tls_and_have_tokens(place: Place, tmp_path: Path) -> None:
    generate = ("generate", "a", "--target", place.server.address, "--max-tokens=3", "--json")
    done = place.command(*generate)
    assert (done.returncode, done.stderr) == (0, "")
    done = place.command(*generate, TOKENLOOM_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    done = place.command(*generate, TOKENLOOM_TOKEN="wrong")
    assert done.returncode == 1
    assert "no `Bearer TOKEN` that this server knows" in done.stderr
    file = put(tmp_path / "token", TOKEN.encode())
    bench = ("bench", place.server.address, "--requests=8", "--processes=2", "--output=4")
    done = place.command(*bench, f"--token-file={file}", TOKENLOOM_TOKEN="wrong")
    assert done.returncode == 0, done.stderr
    assert "8 done" in done.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--target=10.0.0.1:1", "--token-file=x"], "in plaintext"),
        (["--tls-cert=a.pem"], "needs cert and key"),
        (["--tls-ca=/nowhere/ca.pem"], "/nowhere/ca.pem cannot be used for TLS"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "a"], ["chat"], ["bench", "--requests=1"]])
def test_access_that_cannot_be_had_is_a_mistake_of_the_command_line(
    command: list[str], options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenloom.client import cli

    if command[0] == "bench":
        options = [option.removeprefix("--target=") for option in options]
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, *options])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
