"""A real gRPC server whose answers the test writes, and shorthands for its messages."""

# ruff: noqa: ARG002 - a servicer's methods take what gRPC gives them

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import NoReturn

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tokenloom.v1 import inference_pb2 as pb
from tokenloom.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

Respond = Callable[[grpc.ServicerContext], Iterator[pb.GenerateResponse]]


def admission(request_id: str = "r1", seed: int = 7, num_prompt: int = 3) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        admission=pb.Admission(request_id=request_id, seed=seed, num_prompt_tokens=num_prompt)
    )


def delta(first_index: int, *token_ids: int, text: str = "") -> pb.GenerateResponse:
    return pb.GenerateResponse(
        delta=pb.Delta(first_index=first_index, token_ids=token_ids, text=text)
    )


def finish(num_completion: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        finish=pb.Finish(
            reason=pb.FINISH_REASON_STOP_TOKEN,
            stop_token_id=2,
            usage=pb.Usage(
                num_prompt_tokens=3, num_completion_tokens=num_completion, prefill_s=0.25
            ),
        )
    )


def hello(_context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    yield admission()
    yield delta(0, 10, text="Hel")
    yield delta(1, 11, 12, text="lo")
    yield finish(3)


def one_token_and_then_silence(context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    """A model that hangs until the client is gone."""
    gone = threading.Event()
    context.add_callback(gone.set)
    yield admission()
    yield delta(0, 1, text="x")
    assert gone.wait(60)


def abort(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    details: Sequence[Message] = (),
) -> NoReturn:
    """Ends a call as a server with google.rpc details does."""
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)
    raise AssertionError


def error_info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="tokenloom", metadata=metadata)


class ScriptedServer(InferenceServicer):
    """Records the requests; a call that ends early sets `left`."""

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.address = ""
        self.requests: list[pb.GenerateRequest] = []
        self.seconds_left: list[float | None] = []
        self.left = threading.Event()
        self.health = health.HealthServicer()

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.seconds_left.append(context.time_remaining())
        ended = threading.Event()
        context.add_callback(lambda: None if ended.is_set() else self.left.set())
        yield from self.respond(context)
        ended.set()

    def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.ServicerContext
    ) -> pb.TokenizeResponse:
        if request.HasField("chat"):
            return pb.TokenizeResponse(token_ids=[1, *(len(m.role) for m in request.chat.messages)])
        if not request.text:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "text: is empty")
        return pb.TokenizeResponse(token_ids=request.text.encode())

    def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.ServicerContext
    ) -> pb.DetokenizeResponse:
        skips = request.skip_special_tokens if request.HasField("skip_special_tokens") else "unset"
        return pb.DetokenizeResponse(text=f"{list(request.token_ids)} {skips}")

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        return pb.GetModelResponse(
            name="scripted",
            architecture="LlamaForCausalLM",
            vocab_size=512,
            max_model_tokens=2048,
            eos_token_ids=[2],
            has_chat_template=True,
            server_version="1",
        )


@contextmanager
def serving(
    respond: Respond = hello,
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[ScriptedServer]:
    """Runs a server; its `address` is where clients find it."""
    servicer = ScriptedServer(respond)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    add_InferenceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer.health, server)
    servicer.health.set("", health_pb2.HealthCheckResponse.SERVING)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    servicer.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
    server.start()
    try:
        yield servicer
    finally:
        server.stop(grace=0).wait()
