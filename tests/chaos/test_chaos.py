"""Clients die, hang and lie, strangers write to the sockets: good streams are unharmed.

Real processes throughout; the fake worker's tokens tell at once if a stream got
a token that is not its own. After each case the core's `check()` holds and
every block is back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import zmq

from tests.chaos.callers import long_request
from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client, InvalidRequest, TokenloomError
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub
from tokenloom.wire import codec
from tokenloom.wire.messages import PROTOCOL_VERSION, Hello, Ready, StepDone
from tokenloom.worker.fake import FakeConfig, expected_tokens

NUM_GOOD = 16
NUM_TOKENS = 300
RELEASE_TIMEOUT_S = 90.0
"""A stopped client is noticed by keepalive: 20 s until a ping, 10 s for its answer."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level_tokenizer())


VOCAB_SIZE = 300
FAKE = FakeConfig(vocab_size=VOCAB_SIZE, num_blocks=8192, max_model_tokens=100_000)


@contextmanager
def serving(checkpoint: Path, step_ms: float, *options: str) -> Iterator[Server]:
    worker = (
        *("--step-ms", str(step_ms)),
        *("--vocab-size", str(FAKE.vocab_size)),
        *("--num-blocks", str(FAKE.num_blocks)),
        *("--max-model-tokens", str(FAKE.max_model_tokens)),
    )
    with Server.of_fake(checkpoint, *options, worker=worker) as server:
        server.client().close()
        yield server


class GoodStreams:
    """Streams that run while the harm is done, each checked token by token."""

    def __init__(self, server: Server) -> None:
        self.client = server.client()
        self.wrong: list[str] = []
        self.started = threading.Barrier(NUM_GOOD + 1)
        self.threads = [
            threading.Thread(target=self.run, args=(seed,), daemon=True) for seed in range(NUM_GOOD)
        ]

    def run(self, seed: int) -> None:
        prompt = [seed + 3] * (seed + 1)
        try:
            stream = self.client.generate(
                prompt, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True, timeout_s=200
            )
            tokens = list(next(stream).token_ids)
            self.started.wait(60)
            for delta in stream:
                tokens += delta.token_ids
        except (TokenloomError, threading.BrokenBarrierError, StopIteration) as error:
            self.wrong.append(f"stream {seed}: {error!r}")
            return
        if tokens != expected_tokens(prompt, NUM_TOKENS, seed=seed, config=FAKE):
            self.wrong.append(f"stream {seed}: its tokens are not its own")

    def __enter__(self) -> None:
        for thread in self.threads:
            thread.start()
        self.started.wait(60)

    def __exit__(self, *_: object) -> None:
        for thread in self.threads:
            thread.join(200)
        self.client.close()
        assert not self.wrong
        assert not any(thread.is_alive() for thread in self.threads)


def start_caller(server: Server) -> subprocess.Popen[bytes]:
    """Starts a client process and returns once it is admitted."""
    caller = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.callers", server.address],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    server.processes.append(caller)
    assert caller.stdout is not None
    assert caller.stdout.readline() == b"admission\n"
    return caller


def test_a_killed_client_gives_its_blocks_back(checkpoint: Path) -> None:
    with serving(checkpoint, 3) as server:
        with GoodStreams(server):
            for _ in range(3):
                caller = start_caller(server)
                caller.send_signal(signal.SIGKILL)
        server.assert_unharmed()
        assert server.stop() == 0


def test_a_stopped_client_gives_its_blocks_back(checkpoint: Path) -> None:
    with serving(checkpoint, 3) as server:
        with GoodStreams(server):
            caller = start_caller(server)
            caller.send_signal(signal.SIGSTOP)
        wait_until(lambda: server.inspect().num_running == 0, RELEASE_TIMEOUT_S)
        server.assert_unharmed()


def test_a_client_that_never_reads_is_ended_after_a_bounded_buffer(checkpoint: Path) -> None:
    with (
        serving(checkpoint, 0, "--max-stream-buffer-tokens", "200") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        with GoodStreams(server):
            lazy = InferenceStub(channel).Generate(long_request(1))
            assert next(lazy).HasField("admission")
        wait_until(lambda: server.inspect().num_running == 0, RELEASE_TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as refusal:
            list(lazy)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        server.assert_unharmed()


def test_garbage_on_the_worker_socket_harms_nobody(checkpoint: Path) -> None:
    with serving(checkpoint, 3) as server:
        stranger = server.context.socket(zmq.DEALER)
        stranger.connect(f"ipc://{server.run_dir}/worker.sock")
        epoch = server.inspect().epoch
        stale = StepDone(
            epoch=epoch - 1, step_id=1, tokens=b"", logprobs=(), faulty_rows=b"", compute_s=0.0
        )
        ready = Ready(
            epoch=epoch,
            num_blocks=1,
            block_size=1,
            vocab_size=1,
            max_model_tokens=1,
            max_step_tokens=8192,
            weights_bytes=0,
            kv_bytes=0,
        )
        hello = Hello(protocol_version=PROTOCOL_VERSION, pid=1, device="cpu", address="")
        frames = [b"", b"\xc1", os.urandom(100_000)]
        frames += [codec.encode(message) for message in (stale, ready, hello)]
        frames += [codec.encode(stale)[:-3], codec.encode(hello) * 2]
        with GoodStreams(server):
            for _ in range(20):
                for frame in frames:
                    stranger.send(frame)
        wait_until(
            lambda: server.inspect().num_dropped_frames >= 20 * len(frames), RELEASE_TIMEOUT_S
        )
        inspection = server.wait_idle()
        assert inspection.num_dropped_frames == 20 * len(frames)
        assert inspection.epoch == epoch
        server.assert_unharmed()


BAD_REQUESTS: dict[str, pb.GenerateRequest] = {
    "no prompt": pb.GenerateRequest(),
    "empty text": pb.GenerateRequest(text=""),
    "no ids": pb.GenerateRequest(tokens=pb.TokenIds()),
    "id past the logits": pb.GenerateRequest(tokens=pb.TokenIds(ids=[VOCAB_SIZE])),
    "id past int32": pb.GenerateRequest(tokens=pb.TokenIds(ids=[2**32 - 1])),
    "no message": pb.GenerateRequest(chat=pb.Chat()),
    "no role": pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="x")])),
    "prompt too long": pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * 100_001)),
    "max_tokens 0": pb.GenerateRequest(text="a", stopping=pb.Stopping(max_tokens=0)),
    "max_tokens too many": pb.GenerateRequest(text="a", stopping=pb.Stopping(max_tokens=10**6)),
    "min over max": pb.GenerateRequest(text="a", stopping=pb.Stopping(max_tokens=2, min_tokens=3)),
    "empty stop string": pb.GenerateRequest(text="a", stopping=pb.Stopping(stop_strings=[""])),
    "many stop strings": pb.GenerateRequest(
        text="a", stopping=pb.Stopping(stop_strings=[str(i) for i in range(100)])
    ),
    "stop id past the logits": pb.GenerateRequest(
        text="a", stopping=pb.Stopping(stop_token_ids=[VOCAB_SIZE])
    ),
    "temperature NaN": pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=float("nan"))),
    "temperature -1": pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=-1)),
    "top_p 0": pb.GenerateRequest(text="a", sampling=pb.Sampling(top_p=0)),
    "min_p 2": pb.GenerateRequest(text="a", sampling=pb.Sampling(min_p=2)),
    "penalty inf": pb.GenerateRequest(
        text="a", sampling=pb.Sampling(frequency_penalty=float("inf"))
    ),
    "repetition_penalty 0": pb.GenerateRequest(
        text="a", sampling=pb.Sampling(repetition_penalty=0)
    ),
    "bias past the logits": pb.GenerateRequest(
        text="a", sampling=pb.Sampling(logit_bias={VOCAB_SIZE: 1.0})
    ),
    "bias too large": pb.GenerateRequest(text="a", sampling=pb.Sampling(logit_bias={1: 101.0})),
    "many top logprobs": pb.GenerateRequest(text="a", output=pb.Output(num_top_logprobs=1000)),
}


def test_bad_requests_of_every_kind_harm_nobody(checkpoint: Path) -> None:
    with serving(checkpoint, 3) as server:
        with GoodStreams(server):
            for _ in range(3):
                with grpc.insecure_channel(server.address) as channel:
                    for name, request in BAD_REQUESTS.items():
                        with pytest.raises(grpc.RpcError) as refusal:
                            list(InferenceStub(channel).Generate(request))
                        code = refusal.value.code()
                        assert code is grpc.StatusCode.INVALID_ARGUMENT, name
                    garbage: Any = channel.unary_stream("/tokenloom.v1.Inference/Generate")
                    with pytest.raises(grpc.RpcError):
                        list(garbage(b"\xff\xff\xff"))
        server.assert_unharmed()


def test_a_violation_names_its_field_and_quotes_the_numbers(checkpoint: Path) -> None:
    with serving(checkpoint, 3) as server, server.client() as client:
        with pytest.raises(InvalidRequest) as refusal:
            client.generate([1] * 100_001).result()
        assert "100001" in str(refusal.value)
        assert refusal.value.violations


def test_cancels_and_deadlines_in_a_crowd_give_every_block_back(checkpoint: Path) -> None:
    with serving(checkpoint, 3) as server:
        with GoodStreams(server), server.client() as client:
            for count in range(40):
                stream = client.generate([7] * (count + 1), ignore_eos=True, timeout_s=0.5)
                if count % 4 == 0:
                    continue  # its deadline ends it
                for _ in range(count % 3):
                    next(stream)
                stream.cancel()
            server.inspect()
        server.assert_unharmed()


def test_sigterm_lets_running_streams_finish_and_exits_with_0(checkpoint: Path) -> None:
    with serving(checkpoint, 3, "--grace-s", "60") as server:
        with GoodStreams(server):
            server.scheduler.send_signal(signal.SIGTERM)
            with server_refuses(server.address) as error:
                pass
            assert error.code is grpc.StatusCode.UNAVAILABLE
        assert server.scheduler.wait(60) == 0
        assert all(process.wait(30) == 0 for process in server.processes)


@contextmanager
def server_refuses(address: str) -> Iterator[TokenloomError]:
    """Asks until a new request is refused, and yields the refusal."""
    while True:
        with Client(address) as client:
            try:
                client.generate([5], max_tokens=1, timeout_s=30).result()
            except TokenloomError as error:
                yield error
                return
