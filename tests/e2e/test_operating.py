"""Operators drain, abort and profile a server of several fronts, by its own port and by command."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client, Unavailable, cli
from tokenloom.client.status import error_from_status
from tokenloom.scheduler.config import ConfigError, SchedulerConfig
from tokenloom.v1 import admin_pb2
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.admin_pb2_grpc import AdminStub
from tokenloom.v1.inference_pb2_grpc import InferenceStub
from tokenloom.worker.fake import FakeConfig, expected_tokens

POCKET = Path(__file__).parents[2] / "models/pocket"
FAKE = FakeConfig(vocab_size=300)
WORKER = ("--step-ms", "5", "--vocab-size", str(FAKE.vocab_size))
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level_tokenizer())


@contextmanager
def operated(
    checkpoint: Path, *options: str, num_ranks: int = 1
) -> Iterator[tuple[Server, AdminStub]]:
    options = ("--admin-listen=127.0.0.1:0", f"--tensor-parallel={num_ranks}", *options)
    with Server.of_fake(checkpoint, *options, worker=WORKER) as server:
        for _ in range(num_ranks - 1):
            server.start_fake_worker(*WORKER)
        server.client().close()
        with grpc.insecure_channel(server.admin_address) as channel:
            yield server, AdminStub(channel)


class LongStream:
    """A stream under way, on a connection of its own, read to its end by a thread."""

    def __init__(self, server: Server, seed: int, num_tokens: int) -> None:
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.expected = expected_tokens([9, seed], num_tokens, seed=seed, config=FAKE)
        self.client = Client(server.address, resume=None)
        self.stream = self.client.generate(
            [9, seed], seed=seed, max_tokens=num_tokens, ignore_eos=True, timeout_s=100
        )
        self.tokens += next(self.stream).token_ids
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        try:
            for delta in self.stream:
                self.tokens += delta.token_ids
        except Unavailable as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.client.close()


def profile(admin: AdminStub, num_steps: int, timeout_s: float = 30) -> grpc.StatusCode:
    """Returns how a call ends."""
    request = admin_pb2.ProfileRequest(num_steps=num_steps)
    try:
        list(admin.Profile(request, timeout=timeout_s))
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def profile_under_way(admin: AdminStub) -> Any:  # noqa: ANN401 - gRPC's types for it are private
    """Returns a call that waits for steps, on a server that has none to do."""
    calls: list[Any] = []

    def is_refused_beside() -> bool:
        calls.append(admin.Profile(admin_pb2.ProfileRequest(num_steps=5)))
        if profile(admin, 5, timeout_s=1) is grpc.StatusCode.FAILED_PRECONDITION:
            return True
        calls.pop().cancel()  # the second came first
        return False

    wait_until(is_refused_beside, 30)
    return calls[0]


def health(address: str, service: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def test_a_drain_refuses_new_requests_and_waits_for_the_last_token_of_all_fronts(
    checkpoint: Path,
) -> None:
    with operated(checkpoint, "--num-fronts=2") as (server, admin):
        streams = [LongStream(server, seed, 1000) for seed in range(8)]
        drained = admin.Drain.future(admin_pb2.DrainRequest(grace_s=60))
        wait_until(lambda: health(server.address, "") != SERVING, 20)
        for _ in range(8):  # connections are spread over the fronts
            assert refusal_of_new(server) == "DRAINING"
        assert not drained.done()
        assert health(server.address, "liveness") == SERVING
        assert drained.result().num_ended == 0
        for stream in streams:
            stream.join()
            assert stream.tokens == stream.expected
        server.assert_unharmed()
        assert cli.main(["drain", server.admin_address]) == 0  # again: there is nothing to do
        for front in server.children("tokenloom.scheduler.front"):
            front.kill()  # those that come in their place are told
        wait_until(lambda: refusal_of_new(server) == "DRAINING", 60)
        assert health(server.address, "") != SERVING


def refusal_of_new(server: Server) -> str:
    """Returns why a new request is refused, on a connection of its own; nothing tries again."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5]))
        with pytest.raises(grpc.RpcError) as refusal:
            list(InferenceStub(channel).Generate(request, timeout=20))
    trailers: Any = refusal.value.trailing_metadata()
    return error_from_status(refusal.value.code(), "", trailers).reason


def test_streams_that_outlast_the_grace_period_end_so_that_they_go_on_elsewhere(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with operated(checkpoint) as (server, _):
        streams = [LongStream(server, seed, 4000) for seed in range(3)]
        assert cli.main(["drain", server.admin_address, "--grace-s", "0.2"]) == 0
        assert capsys.readouterr().out == "drained; 3 requests were ended\n"
        for stream in streams:
            stream.join()
            assert isinstance(stream.error, Unavailable)
            assert stream.error.reason == "DRAINING"
            assert stream.tokens == stream.expected[: len(stream.tokens)]
        server.assert_unharmed()
        assert server.stop() == 0


def test_an_operator_ends_the_request_that_he_names_and_no_other(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with operated(checkpoint, "--num-fronts=2") as (server, admin):
        streams = [LongStream(server, seed, 400) for seed in range(6)]
        victim = streams[2]
        assert cli.main(["abort", server.admin_address, victim.stream.admission().request_id]) == 0
        for stream in streams:
            stream.join()
        assert victim.stream.result().finish_reason == "cancelled"
        assert len(victim.tokens) < len(victim.expected)
        assert all(stream.tokens == stream.expected for stream in streams if stream is not victim)
        assert cli.main(["abort", server.admin_address, "nobody"]) == 1
        assert "no request 'nobody' runs or waits" in capsys.readouterr().err
        for request_id in ("", "x" * 300):
            request = admin_pb2.AbortRequest(request_id=request_id)
            with pytest.raises(grpc.RpcError) as refusal:
                admin.Abort(request)
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        server.assert_unharmed()


def test_each_rank_shows_what_it_did_in_the_next_steps(checkpoint: Path, tmp_path: Path) -> None:
    with operated(checkpoint, num_ranks=2) as (server, _):
        stream = LongStream(server, 1, 600)
        output = tmp_path / "traces"
        arguments = [server.admin_address, "--num-steps", "7", "--output", str(output)]
        assert cli.main(["profile", *arguments]) == 0
        for rank in range(2):
            trace = json.loads(gzip.decompress((output / f"rank-{rank}.json.gz").read_bytes()))
            assert len(trace["traceEvents"]) == 7
        stream.join()
        assert stream.tokens == stream.expected


def test_one_profile_at_a_time_and_who_leaves_makes_room(checkpoint: Path) -> None:
    with operated(checkpoint) as (server, admin):
        waiting = profile_under_way(admin)
        waiting.cancel()
        stream = LongStream(server, 1, 300)
        wait_until(lambda: profile(admin, 3) is grpc.StatusCode.OK, 20)
        stream.join()
        for num_steps in (0, 1001):
            assert profile(admin, num_steps) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_real_worker_shows_its_operations() -> None:
    with (
        Server.of_model(POCKET, "--admin-listen=127.0.0.1:0") as server,
        server.client() as client,
        grpc.insecure_channel(server.admin_address) as channel,
    ):
        responses = AdminStub(channel).Profile(admin_pb2.ProfileRequest(num_steps=4))
        client.generate("Once", max_tokens=30, ignore_eos=True, timeout_s=60).result()
        trace = json.loads(gzip.decompress(b"".join(each.data for each in responses)))
        names = {event.get("name") for event in trace["traceEvents"]}
        assert "aten::linear" in names
        client.generate("Once", max_tokens=5, timeout_s=60).result()


def test_without_a_model_there_is_nothing_to_profile_and_the_loss_of_it_ends_a_profile(
    checkpoint: Path,
) -> None:
    command = ("scheduler", "--model", str(checkpoint), "--admin-listen=127.0.0.1:0")
    with Server(*command) as server, grpc.insecure_channel(server.admin_address) as channel:
        admin = AdminStub(channel)
        assert profile(admin, 5) is grpc.StatusCode.UNAVAILABLE
        worker = server.start_fake_worker(*WORKER)
        server.client().close()
        waiting = profile_under_way(admin)
        worker.kill()
        with pytest.raises(grpc.RpcError) as lost:
            next(waiting)
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE


def test_callers_do_not_reach_the_operators_service(checkpoint: Path) -> None:
    with (
        operated(checkpoint) as (server, _),
        grpc.insecure_channel(server.address) as channel,
        pytest.raises(grpc.RpcError) as refusal,
    ):
        AdminStub(channel).Drain(admin_pb2.DrainRequest())
    assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_operators_are_served_on_this_host_alone() -> None:
    for listen in ("0.0.0.0:1", "10.0.0.1:50052", "[::]:50052", "example.org:1"):
        with pytest.raises(ConfigError, match="admin_listen"):
            SchedulerConfig(model="m", run_dir="r", admin_listen=listen)
    for listen in ("127.0.0.1:0", "localhost:50052", "[::1]:50052", "unix:/run/admin.sock"):
        SchedulerConfig(model="m", run_dir="r", admin_listen=listen)


def test_the_operators_process_dies_alone_and_comes_back(checkpoint: Path) -> None:
    with operated(checkpoint) as (server, _):
        stream = LongStream(server, 1, 300)
        (process,) = server.children("tokenloom.scheduler.admin")
        process.kill()
        wait_until(lambda: _aborts(server), 60)
        stream.join()
        assert stream.tokens == stream.expected


def _aborts(server: Server) -> bool:
    """Returns whether the service answers that there is no such request."""
    with grpc.insecure_channel(server.admin_address) as channel:
        try:
            AdminStub(channel).Abort(admin_pb2.AbortRequest(request_id="nobody"), timeout=5)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.NOT_FOUND)
    return False
