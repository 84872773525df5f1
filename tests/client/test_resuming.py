"""A stream that breaks off goes on behind what it brought, or says what broke it."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import grpc
import pytest

from tests.client.scripted import abort, admission, delta, error_info, finish, serving
from tokenloom.client import (
    Admission,
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    Delta,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    Result,
    Resume,
    ServerError,
    TokenloomError,
    Unavailable,
)
from tokenloom.client.testing import Answer, Event, FakeServer
from tokenloom.v1 import inference_pb2 as pb

ADMITTED = Admission(
    request_id="first",
    seed=2**64 - 1,
    num_prompt_tokens=2,
    num_cached_tokens=0,
    max_tokens=77,
    fingerprint="f",
)
AGAIN = Admission(
    request_id="second",
    seed=2**64 - 1,
    num_prompt_tokens=2,
    num_cached_tokens=1,
    max_tokens=77,
    fingerprint="f",
)
SOON = Resume(max_attempts=3, first_pause_s=0.0)

LOST = Unavailable("Socket closed")
RESET = ServerError("Received RST_STREAM with error code 2", code=grpc.StatusCode.INTERNAL)
NO_STATUS = ServerError("Stream removed", code=grpc.StatusCode.UNKNOWN)
DRAINING = Unavailable("the server shuts down", reason="DRAINING")
CORE_LOST = Unavailable("the scheduler's core is gone", reason="CORE_LOST")

Read = Callable[[FakeServer, Resume | None], Result]


def answers(*each: Sequence[Event]) -> FakeServer:
    """Returns a server that answers its first calls so."""
    left = iter(each)
    return FakeServer(lambda _: Answer(next(left)))


def read(server: FakeServer, resume: Resume | None) -> Result:
    with Client(server, resume=resume) as client:
        return client.generate("Hi", temperature=0.5, stop="x", num_top_logprobs=1).result()


def read_async(server: FakeServer, resume: Resume | None) -> Result:
    async def complete() -> Result:
        async with AsyncClient(server, resume=resume) as client:
            options = {"temperature": 0.5, "stop": "x", "num_top_logprobs": 1}
            return await client.generate("Hi", **options).result()  # type: ignore[arg-type]

    return asyncio.run(complete())


both_clients = pytest.mark.parametrize("read", [read, read_async])


@both_clients
@pytest.mark.parametrize("broken", [LOST, RESET, NO_STATUS, DRAINING, CORE_LOST])
def test_a_broken_stream_goes_on_behind_what_it_brought(read: Read, broken: Event) -> None:
    server = answers([ADMITTED, "Hé", "l", broken], [AGAIN, "lo"])
    result = read(server, SOON)
    assert (result.text, result.token_ids) == ("Héllo", tuple("Héllo".encode()))
    assert (result.request_id, result.seed) == ("first", 2**64 - 1)
    assert result.usage.num_completion_tokens == 6
    first, second = (call.request for call in server.calls)
    assert not first.HasField("resume_from")
    expected = pb.GenerateRequest()
    expected.CopyFrom(first)
    expected.sampling.seed = 2**64 - 1
    expected.stopping.max_tokens = 77
    expected.resume_from.fingerprint = "f"
    expected.resume_from.token_ids.extend("Hél".encode())
    expected.resume_from.num_text_bytes = 4
    assert second == expected


@both_clients
def test_a_stream_that_brought_nothing_yet_goes_on_with_its_seed(read: Read) -> None:
    server = answers([ADMITTED, LOST], [AGAIN, "Hello"])
    assert read(server, SOON).text == "Hello"
    assert server.calls[1].request.resume_from.token_ids == []


@both_clients
@pytest.mark.parametrize(
    "refusal",
    [
        LOST,
        CORE_LOST,
        Unavailable("loading", reason="NOT_READY"),
        Unavailable("no worker", reason="MODEL_LOST"),
        Overloaded("full", reason="QUEUE_FULL", retry_after_s=0.001),
    ],
)
def test_a_server_that_is_not_ready_yet_is_asked_again(read: Read, refusal: Event) -> None:
    server = answers([ADMITTED, "Hel", LOST], [refusal], [refusal], [AGAIN, "lo"])
    assert read(server, SOON).text == "Hello"
    assert len(server.calls) == 4


@both_clients
def test_attempts_without_a_token_between_are_bounded(read: Read) -> None:
    refusal: list[Event] = [CORE_LOST]
    server = answers([ADMITTED, "Hel", LOST], *[refusal] * 3)
    with pytest.raises(Unavailable) as error:
        read(server, SOON)
    assert error.value is LOST
    assert error.value.__cause__ is CORE_LOST
    assert len(server.calls) == 4
    one_more: list[Event] = [AGAIN, "e", LOST]
    alive = answers([ADMITTED, "H", LOST], *[one_more] * 20, [AGAIN, "!"])
    assert read(alive, SOON).text == "H" + "e" * 20 + "!"
    none_more: list[Event] = [AGAIN, LOST]
    stillborn = answers([ADMITTED, "H", LOST], *[none_more] * 20)
    with pytest.raises(Unavailable):
        read(stillborn, SOON)
    assert len(stillborn.calls) == 4


@both_clients
@pytest.mark.parametrize(
    "own",
    [
        Unavailable("gone", reason="MODEL_LOST"),
        ServerError("fault", reason="MODEL_CRASH"),
        Overloaded("slow", reason="CLIENT_TOO_SLOW"),
        DeadlineExceeded("over"),
        Cancelled("by the operator", reason="ENDED_BY_OPERATOR"),
    ],
)
def test_the_servers_own_errors_end_the_stream(read: Read, own: TokenloomError) -> None:
    server = answers([ADMITTED, "Hel", own])
    with pytest.raises(type(own)) as error:
        read(server, SOON)
    assert error.value is own
    resumed = answers([ADMITTED, "Hel", LOST], [AGAIN, "l", own])
    with pytest.raises(type(own)) as error:
        read(resumed, SOON)
    assert error.value is own


@both_clients
def test_another_model_is_told_as_what_broke_the_stream(read: Read) -> None:
    other = InvalidRequest("other", code=grpc.StatusCode.FAILED_PRECONDITION, reason="OTHER_MODEL")
    server = answers([ADMITTED, "Hel", LOST], [other])
    with pytest.raises(Unavailable) as error:
        read(server, SOON)
    assert (error.value, error.value.__cause__) == (LOST, other)


@both_clients
def test_without_resumption_the_error_reaches_the_caller(read: Read) -> None:
    server = answers([ADMITTED, "Hel", LOST])
    with pytest.raises(Unavailable) as error:
        read(server, None)
    assert error.value is LOST
    assert len(server.calls) == 1


@both_clients
def test_what_was_not_admitted_or_cannot_be_resumed_is_not_asked_again(read: Read) -> None:
    cases: list[list[Event]] = [[LOST], ["Hel", LOST]]
    for events in cases:  # an Admission of its own has no fingerprint
        server = answers(events)
        with pytest.raises(Unavailable):
            read(server, SOON)
        assert len(server.calls) == 1


@both_clients
def test_a_gap_at_the_seam_and_a_second_admission_are_protocol_errors(read: Read) -> None:
    gap = Delta(first_index=2, token_ids=(108,), text="l")
    with pytest.raises(ProtocolError, match="begins at token 2; expected 3"):
        read(answers([ADMITTED, "Hel", LOST], [AGAIN, gap]), SOON)
    with pytest.raises(ProtocolError, match="admission"):
        read(answers([ADMITTED, "Hel", AGAIN]), SOON)
    with pytest.raises(ProtocolError, match="admission"):
        read(answers([ADMITTED, "Hel", LOST], [AGAIN, AGAIN]), SOON)


def test_what_goes_on_has_what_is_left_of_the_callers_time() -> None:
    server = answers([ADMITTED, "Hel", LOST], [AGAIN, "lo"])
    with Client(server, resume=SOON) as client:
        client.generate("Hi", timeout_s=1000.0).result()
    first, second = (call.timeout_s for call in server.calls)
    assert first == 1000.0
    assert second is not None
    assert 0 < second < first


def test_cancelling_ends_the_pause() -> None:
    server = answers([ADMITTED, "Hel", LOST])
    with Client(server, resume=Resume(first_pause_s=math.inf, max_pause_s=1000.0)) as client:
        stream = client.generate("Hi")
        next(stream)
        timer = threading.Timer(0.05, stream.cancel)
        timer.start()
        with pytest.raises(Cancelled):
            stream.result()
        timer.join()
    assert len(server.calls) == 1


async def test_a_task_that_is_cancelled_in_the_pause_ends_the_stream() -> None:
    server = answers([ADMITTED, "Hel", LOST])
    patient = Resume(first_pause_s=math.inf, max_pause_s=1000.0)
    async with AsyncClient(server, resume=patient) as client:
        stream = client.generate("Hi")
        await anext(stream)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.result()
        with pytest.raises(Cancelled):
            await stream.result()
        assert stream.partial_text == "Hel"
    assert len(server.calls) == 1


def test_pauses_double_up_to_the_longest_and_differ_between_streams() -> None:
    resume = Resume(first_pause_s=0.5, max_pause_s=3.0)
    pauses = [resume.pause_s(num_attempts) for num_attempts in range(1000)]
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0
    assert 1.5 <= min(pauses[3:]) < max(pauses) <= 3.0


# Over gRPC -----------------------------------------------------------------------------------


def fingerprinted() -> pb.GenerateResponse:
    response = admission()
    response.admission.fingerprint = "f"
    response.admission.max_tokens = 9
    return response


def test_an_aborted_call_is_resumed() -> None:
    num_calls = 0

    def respond(context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            yield fingerprinted()
            yield delta(0, 10, text="Hel")
            abort(context, grpc.StatusCode.UNAVAILABLE, "connection reset")
        yield fingerprinted()
        yield delta(1, 11, text="lo")
        yield finish(2)

    with serving(respond) as server, Client(server.address, resume=SOON) as client:
        assert client.generate("Hi").result().text == "Hello"
    assert [len(request.resume_from.token_ids) for request in server.requests] == [0, 1]


def test_a_deadline_that_passes_before_a_server_is_back_is_one() -> None:
    num_calls = 0

    def respond(context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            yield fingerprinted()
            abort(context, grpc.StatusCode.UNAVAILABLE, "connection reset")
        abort(context, grpc.StatusCode.UNAVAILABLE, "loading", [error_info("NOT_READY")])

    slow = Resume(max_attempts=1000, first_pause_s=0.05, max_pause_s=0.05)
    with (
        serving(respond) as server,
        Client(server.address, resume=slow) as client,
        pytest.raises(DeadlineExceeded),
    ):
        client.generate("Hi", timeout_s=0.5).result()


def test_a_client_that_is_closed_in_the_pause_cancels() -> None:
    def respond(context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        yield fingerprinted()
        abort(context, grpc.StatusCode.UNAVAILABLE, "connection reset")

    with serving(respond) as server:
        client = Client(server.address, resume=Resume(first_pause_s=0.2))
        stream = client.generate("Hi")
        stream.admission()
        timer = threading.Timer(0.05, client.close)
        timer.start()
        with pytest.raises(Cancelled):
            stream.result()
        timer.join()
