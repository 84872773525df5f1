import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2

from tests.client.scripted import (
    abort,
    admission,
    delta,
    error_info,
    finish,
    hello,
    one_token_and_then_silence,
    serving,
)
from tokenloom.client import (
    AccessDenied,
    Cancelled,
    Client,
    DeadlineExceeded,
    FinishReason,
    InvalidRequest,
    LimitExceeded,
    Message,
    Overloaded,
    ProtocolError,
    ServerError,
    TokenloomError,
    Unavailable,
    Violation,
)
from tokenloom.client.requests import ChatMessages
from tokenloom.v1 import inference_pb2 as pb

Responses = Iterator[pb.GenerateResponse]


def test_stream_yields_each_delta_once_and_then_the_result() -> None:
    with serving() as server, Client(server.address) as client:
        stream = client.generate("Say hello")
        assert stream.admission().request_id == "r1"
        assert [(each.first_index, each.token_ids, each.text) for each in stream] == [
            (0, (10,), "Hel"),
            (1, (11, 12), "lo"),
        ]
        result = stream.result()
        assert (result.text, result.token_ids, result.seed) == ("Hello", (10, 11, 12), 7)
        assert result.finish_reason is FinishReason.STOP_TOKEN
        assert (result.stop_token_id, result.stop_string) == (2, None)
        assert (result.usage.prefill_s, result.usage.decode_s) == (0.25, None)
        assert list(stream) == []


def test_text_is_whole_however_much_was_read_before() -> None:
    with serving() as server, Client(server.address) as client:
        stream = client.generate("Say hello")
        assert next(stream).text == "Hel"
        assert stream.partial_text == "Hel"
        assert stream.text() == "Hello"


def test_options_left_out_are_not_sent_and_zero_is_sent_as_zero() -> None:
    with serving() as server, Client(server.address) as client:
        client.generate("a").result()
        client.generate("a", temperature=0, top_k=0, seed=0, min_p=None, ignore_eos=False).result()
    bare, given = server.requests
    assert bare == pb.GenerateRequest(text="a")
    assert given.sampling == pb.Sampling(temperature=0, top_k=0, seed=0)
    assert given.sampling.HasField("temperature")
    assert not given.sampling.HasField("min_p")
    assert given.stopping.HasField("ignore_eos")
    assert not given.HasField("output")


def test_every_option_reaches_its_field() -> None:
    with serving() as server, Client(server.address) as client:
        client.generate(
            [5, 6],
            temperature=0.5,
            top_p=0.75,
            top_k=3,
            min_p=0.25,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            logit_bias={4: -2.0},
            seed=2**64 - 1,
            max_tokens=8,
            min_tokens=2,
            stop="end",
            stop_token_ids=[9],
            ignore_eos=True,
            num_top_logprobs=2,
            skip_special_tokens=False,
        ).result()
    assert server.requests == [
        pb.GenerateRequest(
            tokens=pb.TokenIds(ids=[5, 6]),
            sampling=pb.Sampling(
                temperature=0.5,
                top_p=0.75,
                top_k=3,
                min_p=0.25,
                presence_penalty=1,
                frequency_penalty=-1,
                repetition_penalty=1.5,
                logit_bias={4: -2.0},
                seed=2**64 - 1,
            ),
            stopping=pb.Stopping(
                max_tokens=8,
                min_tokens=2,
                stop_strings=["end"],
                stop_token_ids=[9],
                ignore_eos=True,
            ),
            output=pb.Output(num_top_logprobs=2, skip_special_tokens=False),
        )
    ]


def test_chat_takes_messages_and_mappings() -> None:
    with serving() as server, Client(server.address) as client:
        messages: ChatMessages = [Message("system", "Be brief."), {"role": "user", "content": "Hi"}]
        assert client.chat(messages, stop=["a", "b"]).text() == "Hello"
        assert client.tokenize_chat(messages) == [1, 6, 4]
    sent = server.requests[0]
    assert [(turn.role, turn.content) for turn in sent.chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]
    assert sent.stopping.stop_strings == ["a", "b"]


def test_arguments_that_no_server_could_take_raise_before_anything_is_sent() -> None:
    with serving() as server, Client(server.address) as client:
        with pytest.raises(TypeError, match="unknown option 'temprature'"):
            client.generate("a", temprature=1)  # type: ignore[call-arg] # the point of the test
        with pytest.raises(ValueError, match="top_k"):
            client.generate("a", top_k=-1)
        with pytest.raises(TypeError, match="max_tokens"):
            client.generate("a", max_tokens="many")  # type: ignore[arg-type] # as above
        with pytest.raises(TypeError, match="messages\\[0\\]"):
            client.chat([{"role": "user"}])
        with pytest.raises(TypeError, match="takes no int"):
            Client(5)  # type: ignore[arg-type] # as above
    assert server.requests == []


def test_an_empty_prompt_of_tokens_is_still_one_of_tokens() -> None:
    with serving() as server, Client(server.address) as client:
        client.generate([]).result()
    assert server.requests[0].WhichOneof("prompt") == "tokens"


def test_tokens_text_and_model_make_the_round_trip() -> None:
    with serving() as server, Client(server.address) as client:
        assert client.tokenize("ab") == [97, 98]
        assert client.detokenize([3, 4]) == "[3, 4] unset"
        assert client.detokenize([3], skip_special_tokens=False) == "[3] False"
        model = client.model()
        assert (model.name, model.vocab_size, model.eos_token_ids) == ("scripted", 512, (2,))
        with pytest.raises(InvalidRequest):
            client.tokenize("")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([admission(), delta(0, 1), delta(2, 3), finish()], "begins at token 2; expected 1"),
        ([admission(), delta(0, 1, 2), delta(1, 2), finish()], "begins at token 1; expected 2"),
        ([delta(0, 1), finish()], "a delta came before the admission"),
        ([finish()], "finish message came before the admission"),
        ([admission(), admission(), finish()], "second admission"),
        ([admission(), delta(0, 1)], "without a finish message, after 1 tokens"),
        ([admission(), finish(), delta(0, 1)], "after the finish message"),
        ([], "without a finish message, after 0 tokens"),
    ],
)
def test_stream_that_breaks_the_order_is_a_protocol_error(
    messages: list[pb.GenerateResponse], complaint: str
) -> None:
    with (
        serving(lambda _context: iter(messages)) as server,
        Client(server.address) as client,
    ):
        stream = client.generate("a")
        with pytest.raises(ProtocolError, match=complaint) as caught:
            stream.result()
        assert caught.value.code is grpc.StatusCode.DATA_LOSS
        with pytest.raises(ProtocolError, match=complaint):
            next(stream)


def test_events_of_a_newer_server_are_passed_over() -> None:
    def respond(_context: grpc.ServicerContext) -> Responses:
        yield admission()
        yield pb.GenerateResponse.FromString(b"\x7a\x00")  # field 15, which nobody knows
        yield delta(0, 1, text="x")
        yield pb.GenerateResponse(finish=pb.Finish(reason=99))  # type: ignore[arg-type] # as above

    with serving(respond) as server, Client(server.address) as client:
        result = client.generate("a").result()
        assert (result.text, result.finish_reason) == ("x", FinishReason.OTHER)


def test_refused_fields_are_named() -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        bad_request = error_details_pb2.BadRequest()
        bad_request.field_violations.add(field="sampling.top_p", description="is 1.5")
        details = [error_info("INVALID_REQUEST"), bad_request]
        abort(context, grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: is 1.5", details)

    with (
        serving(respond) as server,
        Client(server.address) as client,
        pytest.raises(InvalidRequest, match=r"^sampling\.top_p: is 1\.5$") as caught,
    ):
        client.generate("a", top_p=1.5).result()
    assert caught.value.violations == (Violation("sampling.top_p", "is 1.5"),)
    assert caught.value.reason == "INVALID_REQUEST"


def test_overload_tells_when_to_come_again() -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(1500)
        details = [error_info("QUEUE_FULL", limit="2048"), retry]
        abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "2048 requests wait", details)

    with (
        serving(respond) as server,
        Client(server.address) as client,
        pytest.raises(Overloaded, match="2048 requests wait") as caught,
    ):
        client.generate("a").admission()
    assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 1.5)
    assert caught.value.metadata == {"limit": "2048"}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, InvalidRequest),
        (grpc.StatusCode.UNAUTHENTICATED, AccessDenied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNKNOWN, ServerError),
    ],
)
def test_every_status_has_its_error(code: grpc.StatusCode, kind: type[TokenloomError]) -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        yield admission()
        yield delta(0, 1, text="so far")
        abort(context, code, "no more", [error_info("BECAUSE", fault_id="f7")])

    with serving(respond) as server, Client(server.address) as client:
        stream = client.generate("a")
        assert next(stream).text == "so far"
        with pytest.raises(kind, match="no more") as caught:
            next(stream)
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.reason) == (code, "BECAUSE")
    assert stream.partial_text == "so far"
    if isinstance(caught.value, ServerError):
        assert caught.value.fault_id == "f7"


def test_a_reason_of_another_domain_is_not_taken_for_the_servers() -> None:
    info = error_details_pb2.ErrorInfo(
        reason="DRAINING", domain="proxy.example", metadata={"a": "b"}
    )

    def respond(context: grpc.ServicerContext) -> Responses:
        abort(context, grpc.StatusCode.UNAVAILABLE, "upstream reset", [info])

    with (
        serving(respond) as server,
        Client(server.address) as client,
        pytest.raises(Unavailable, match="upstream reset") as error,
    ):
        client.generate("x").result()
    assert (error.value.reason, error.value.metadata) == ("", {})


def test_unreadable_details_leave_the_status() -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        yield admission()

    with (
        serving(respond) as server,
        Client(server.address) as client,
        pytest.raises(Overloaded, match="full") as caught,
    ):
        client.generate("a").result()
    assert caught.value.reason == ""


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("200 tokens wait to be read", "CLIENT_TOO_SLOW"),
        ("CLIENT: Received message larger than max (45000000 vs. 41943040)", ""),
    ],
)
def test_what_no_retry_changes_is_not_called_overload(message: str, reason: str) -> None:
    def respond(context: grpc.ServicerContext) -> Responses:
        abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, message, [error_info(reason)])
        yield admission()

    with (
        serving(respond) as server,
        Client(server.address) as client,
        pytest.raises(LimitExceeded) as caught,
    ):
        client.generate("a").result()
    assert caught.value.reason == reason


def test_chat_messages_of_another_type_are_refused_by_name() -> None:
    with Client("localhost:1") as client:
        with pytest.raises(TypeError, match="list of turns"):
            client.chat("hello")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"messages\[0\] has a list as content"):
            client.chat([{"role": "user", "content": ["hello"]}])  # type: ignore[dict-item]


def test_cancelled_stream_tells_the_server_and_raises() -> None:
    with serving(one_token_and_then_silence) as server, Client(server.address) as client:
        stream = client.generate("a")
        assert next(stream).text == "x"
        threading.Timer(0.05, stream.cancel).start()
        with pytest.raises(Cancelled):
            next(stream)
        assert server.left.wait(30)
        with pytest.raises(Cancelled):
            stream.result()


def test_leaving_the_block_of_an_unfinished_stream_cancels_it() -> None:
    with serving(one_token_and_then_silence) as server, Client(server.address) as client:
        with client.generate("a") as stream:
            for each in stream:
                assert each.text == "x"
                break
        assert server.left.wait(30)


def test_cancelling_after_the_end_changes_nothing() -> None:
    with serving() as server, Client(server.address) as client:
        with client.generate("a") as stream:
            stream.result()
        stream.cancel()
        assert stream.text() == "Hello"


def test_timeout_is_the_deadline_that_the_server_sees() -> None:
    with serving(one_token_and_then_silence) as server, Client(server.address) as client:
        with pytest.raises(DeadlineExceeded):
            client.generate("a", timeout_s=0.2).result()
        seconds_left = server.seconds_left[0]
        assert seconds_left is not None
        assert seconds_left < 0.21  # gRPC rounds up what it sends
        assert server.left.wait(30)


def test_no_server_is_unavailable() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(Unavailable, match="onnect") as caught,
    ):
        client.generate("a").result()
    assert caught.value.reason == ""


def test_ready_comes_when_a_loading_server_serves() -> None:
    with serving() as server, Client(server.address) as client:
        server.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.2 s"):
            client.wait_ready(timeout_s=0.2)
        serve = threading.Timer(
            0.1, server.health.set, ("", health_pb2.HealthCheckResponse.SERVING)
        )
        serve.start()
        client.wait_ready(timeout_s=60)
        serve.join()


def test_ready_waits_for_a_server_that_does_not_listen_yet(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/server.sock"
    with Client(address) as client:
        ready = threading.Thread(target=client.wait_ready)
        ready.start()
        with serving(address=address):
            ready.join(60)
            assert not ready.is_alive()
            assert client.generate("a").text() == "Hello"


def test_client_reconnects_to_a_server_that_was_started_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/server.sock"
    with Client(address) as client:
        for _ in range(2):
            with serving(address=address):
                client.wait_ready(timeout_s=60)
                assert client.generate("a").text() == "Hello"
            with pytest.raises(Unavailable):
                client.model()


def test_each_client_has_a_connection_of_its_own() -> None:
    peers = []

    def respond(context: grpc.ServicerContext) -> Responses:
        peers.append(context.peer())
        return hello(context)

    with (
        serving(respond) as server,
        Client(server.address) as one,
        Client(server.address) as other,
    ):
        for client in (one, other, one):
            client.generate("a").result()
    assert peers[0] == peers[2] != peers[1]


def test_given_channel_stays_open() -> None:
    with serving(hello) as server, grpc.insecure_channel(server.address) as channel:
        with Client(channel) as client:
            assert client.generate("a").text() == "Hello"
        with Client(channel) as client:
            assert client.generate("a").text() == "Hello"


def test_credentials_secure_the_connection() -> None:
    server_credentials = grpc.local_server_credentials(grpc.LocalConnectionType.LOCAL_TCP)
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.LOCAL_TCP)
    with (
        serving(credentials=server_credentials) as server,
        Client(server.address, credentials=credentials) as client,
    ):
        assert client.generate("a").text() == "Hello"
        with (
            grpc.insecure_channel(server.address) as channel,
            pytest.raises(TypeError, match="credentials go with an address, and so does a token"),
        ):
            Client(channel, credentials=credentials)


def test_closing_the_client_cancels_its_streams() -> None:
    with serving(one_token_and_then_silence) as server:
        client = Client(server.address)
        stream = client.generate("a")
        stream.admission()
        client.close()
        with pytest.raises(Cancelled):
            stream.result()


def test_many_threads_share_a_client() -> None:
    texts: list[str] = []
    with serving() as server, Client(server.address) as client:
        threads = [
            threading.Thread(target=lambda: texts.append(client.generate("a").text()))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert texts == ["Hello"] * 16
