"""What went wrong in other inference servers, tried on this one; SECURITY.md has the whole list.

A real server with two fronts. The fake worker refuses what no request may make the core send, and
its tokens tell at once if a stream got what is not its own.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import zmq

from tests.core.processes import FrontSocket, sampling
from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client
from tokenloom.scheduler.messages import Commands, RefusalReason, Submit, encode
from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceStub
from tokenloom.worker.fake import FakeConfig, expected_tokens

FAKE = FakeConfig(vocab_size=300)
"""Fewer than the tokenizer knows: its last tokens lie past the logits."""
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), byte_level_tokenizer())
    options = ("--num-fronts=2", "--admin-listen=127.0.0.1:0")
    with Server.of_fake(checkpoint, *options, worker=("--vocab-size=300",)) as server:
        server.client().close()
        yield server


@pytest.fixture(autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    """Whatever a test did: the same workers serve, right tokens come, and nothing is kept."""
    epoch = server.inspect().epoch
    yield
    with Client(server.address) as client:
        tokens = client.generate([5, 6], seed=3, max_tokens=50, ignore_eos=True).result().token_ids
    assert list(tokens) == expected_tokens([5, 6], 50, seed=3, config=FAKE)
    assert server.inspect().epoch == epoch
    server.assert_unharmed()


UNPICKLE = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"


def test_a_pickle_is_read_on_no_socket(server: Server, tmp_path: Path) -> None:
    sign = tmp_path / "unpickled"
    bomb = f"cposix\nsystem\n(S'touch {sign}'\ntR.".encode()
    dropped = server.inspect().num_dropped_frames
    for name in ("worker.sock", "core.sock"):
        stranger = server.context.socket(zmq.DEALER)
        stranger.connect(f"ipc://{server.run_dir}/{name}")
        for frame in (bomb, b"\x80\x05" + bomb, struct.pack("<Q", len(bomb)) + bomb):
            stranger.send(frame)
    wait_until(lambda: server.inspect().num_dropped_frames >= dropped + 6, 30)
    for address, method in (
        (server.address, "/tokenloom.v1.Inference/Generate"),
        (server.address, "/grpc.health.v1.Health/Watch"),
        (server.admin_address, "/tokenloom.v1.Admin/Abort"),
    ):
        with grpc.insecure_channel(address) as channel:
            call: Any = channel.unary_stream(method)
            with pytest.raises(grpc.RpcError):
                list(call(bomb, timeout=10))
    assert not sign.exists()
    subprocess.run([sys.executable, "-c", UNPICKLE], input=bomb, check=True)
    assert sign.exists()  # it does go off where somebody unpickles it


PAST = FAKE.vocab_size
OVER_LIMITS: dict[str, pb.GenerateRequest] = {
    "a token id": pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, PAST])),
    "a stop token": pb.GenerateRequest(text="a", stopping=pb.Stopping(stop_token_ids=[PAST])),
    "a bias": pb.GenerateRequest(text="a", sampling=pb.Sampling(logit_bias={PAST: 1.0})),
    "a beginning": pb.GenerateRequest(
        text="a",
        sampling=pb.Sampling(seed=1),
        stopping=pb.Stopping(max_tokens=5),
        resume_from=pb.ResumeFrom(token_ids=[PAST]),
    ),
    "biases": pb.GenerateRequest(
        text="a", sampling=pb.Sampling(logit_bias=dict.fromkeys(range(10_000), 1.0))
    ),
    "messages": pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")] * 1025)),
    "stop strings": pb.GenerateRequest(text="a", stopping=pb.Stopping(stop_strings=["x"] * 17)),
    "top logprobs": pb.GenerateRequest(text="a", output=pb.Output(num_top_logprobs=21)),
}


def test_every_front_refuses_what_is_over_a_limit(server: Server) -> None:
    for _ in range(8):  # each a connection of its own, on either front
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            for name, request in OVER_LIMITS.items():
                with pytest.raises(grpc.RpcError) as refusal:
                    list(InferenceStub(channel).Generate(request))
                assert refusal.value.code() is INVALID, name
            with pytest.raises(grpc.RpcError) as refusal:
                InferenceStub(channel).Detokenize(pb.DetokenizeRequest(token_ids=[PAST]))
            assert refusal.value.code() is INVALID


def submit(stream: int, ids: list[int], salt: str = "", **changes: object) -> Submit:
    return Submit(
        stream=stream,
        tokens=np.array(ids, np.int32).tobytes(),
        max_tokens=5,
        sampling=sampling(**changes),  # type: ignore[arg-type]
        salt=salt,
    )


def test_the_core_refuses_by_itself_what_a_front_should_have(server: Server) -> None:
    front = FrontSocket(server.context, f"ipc://{server.run_dir}/core.sock")
    front.send(
        submit(1, [5, PAST]),
        submit(2, [5, -1]),
        submit(3, [5], stop_token_ids=(PAST,)),
        submit(4, [5], logit_bias=((PAST, 1.0),)),
        submit(5, []),
    )
    front.until(lambda: len(front.refused) == 5)
    assert {refused.reason for refused in front.refused.values()} == {RefusalReason.INVALID}
    front.socket.close()


def test_text_whose_tokens_lie_past_the_logits_ends_alone(server: Server) -> None:
    tokenizer = byte_level_tokenizer()
    text = next(
        text
        for text in (tokenizer.decode([token_id]) for token_id in range(PAST, 512))
        if max(tokenizer.encode(text, add_special_tokens=False).ids, default=0) >= PAST
    )
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as refusal:
            list(InferenceStub(channel).Generate(pb.GenerateRequest(text=text)))
        assert refusal.value.code() in {INVALID, grpc.StatusCode.INTERNAL}


def test_an_odd_salt_is_its_own_requests_affair(server: Server) -> None:
    front = FrontSocket(server.context, f"ipc://{server.run_dir}/core.sock")
    salts = ["", "\0", "\x00" * 1000, "é🎉", "../../etc/passwd", "x" * 2**20, "%s{}", "\ud7ff"]
    for stream, salt in enumerate(salts):
        front.send(submit(stream, [7, 8, 9], salt=salt))
    front.until(lambda: len(front.finished) == len(salts))
    assert all(len(tokens) == 5 for tokens in front.tokens.values())
    # Bytes that are no text at all make the whole frame garbage, and nothing else.
    frame = encode(Commands(commands=(submit(99, [7], salt="SALT"),)))
    dropped = server.inspect().num_dropped_frames
    front.socket.send(frame.replace(b"SALT", b"\xff\xfe\xfd\xfc"))
    wait_until(lambda: server.inspect().num_dropped_frames > dropped, 30)
    front.socket.close()
