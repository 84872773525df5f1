"""Schedulers die while 32 streams run: each goes on elsewhere as if nothing had happened.

Real processes throughout. What a stream brings in two parts is compared with what it brings
undisturbed: token ids, text, log probabilities, reason and counts.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest

from tests.e2e.server import Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client, Options, Result, Resume, TokenloomError, Unavailable

POCKET = Path(__file__).parents[2] / "models" / "pocket"
NUM_STREAMS = 32
VOCAB_SIZE = 300
CHANNEL_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 200)]
FAKE_OPTIONS = ("--step-ms=4", f"--vocab-size={VOCAB_SIZE}", "--load-s=0.3")


@dataclass(kw_only=True)
class Case:
    """One request, and what it brings undisturbed."""

    prompt: list[int]
    options: Options
    result: Result | None = None


@dataclass(kw_only=True)
class Crowd:
    """The streams of all cases at once, and what became of them."""

    cases: list[Case]
    num_tokens: list[int] = field(default_factory=lambda: [0] * NUM_STREAMS)
    results: dict[int, Result] = field(default_factory=dict)
    errors: dict[int, TokenloomError] = field(default_factory=dict)

    def run(self, client: Client, harm: Callable[[Crowd], None] = lambda _: None) -> None:
        """Reads all streams to their ends; the harm is done meanwhile."""
        threads = [
            threading.Thread(target=self._read, args=(client, place), daemon=True)
            for place in range(NUM_STREAMS)
        ]
        for thread in threads:
            thread.start()
        harm(self)
        for thread in threads:
            thread.join(250)
        assert not any(thread.is_alive() for thread in threads)

    def _read(self, client: Client, place: int) -> None:
        case = self.cases[place]
        stream = client.generate(case.prompt, timeout_s=250, **case.options)
        try:
            for delta in stream:  # which checks that indices follow each other
                self.num_tokens[place] += len(delta.token_ids)
            self.results[place] = stream.result()
        except TokenloomError as error:
            self.errors[place] = error

    def assert_undisturbed(self) -> None:
        assert self.errors == {}
        for place, case in enumerate(self.cases):
            assert _content(self.results[place]) == _content(case.result), case
            assert _numbers(self.results[place]) == pytest.approx(_numbers(case.result), abs=1e-3)


def _content(result: Result | None) -> tuple[object, ...]:
    """Returns what must not depend on how often a stream broke."""
    assert result is not None
    return (
        result.text,
        result.token_ids,
        [[top.token_id for top in entry.top] for entry in result.logprobs],
        (result.finish_reason, result.stop_token_id, result.stop_string, result.seed),
        (result.usage.num_prompt_tokens, result.usage.num_completion_tokens),
    )


def _numbers(result: Result | None) -> list[float]:
    """Returns the log probabilities, which batches round in their ways."""
    assert result is not None
    numbers = [entry.logprob for entry in result.logprobs]
    return numbers + [top.logprob for entry in result.logprobs for top in entry.top]


def make_cases(client: Client, *, vocab_size: int, num_tokens: int) -> list[Case]:
    """Returns requests of all kinds: a stop string in the last third of every fourth."""
    draw = random.Random(5)
    cases = [
        Case(
            prompt=[draw.randrange(4, vocab_size) for _ in range(draw.randint(1, 200))],
            options=Options(
                seed=draw.randrange(2**64),
                temperature=place % 2,
                frequency_penalty=0.5 if place % 3 == 0 else 0.0,
                min_tokens=num_tokens // 2,
                max_tokens=num_tokens,
                num_top_logprobs=2 if place % 5 == 0 else None,
                ignore_eos=True,
            ),
        )
        for place in range(NUM_STREAMS)
    ]
    first = Crowd(cases=cases)
    first.run(client)
    assert first.errors == {}
    for place, case in enumerate(cases):
        case.result = first.results[place]
        if place % 4 == 0:
            text = case.result.text
            middle = 3 * len(text) // 4
            case.options["stop"] = [text[middle : middle + 3], "never to be seen"]
            case.result = client.generate(case.prompt, **case.options).result()
            assert case.result.stop_string is not None
    return cases


@dataclass(kw_only=True)
class Replicas:
    """One server that stays, and a way to start those that do not."""

    start: Callable[..., Server]
    stays: Server
    cases: list[Case]


def channel_to_first(*servers: Server) -> AbstractContextManager[grpc.Channel]:
    """Returns a channel that takes the first that answers, where the SDK's own shares them all."""
    addresses = ",".join(server.address for server in servers)
    return grpc.insecure_channel(f"ipv4:{addresses}", options=CHANNEL_OPTIONS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level_tokenizer())


@pytest.fixture(scope="module")
def replicas(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Replicas]:
    def start_fake(*options: str) -> Server:
        return Server.of_fakes(checkpoint, *options, worker=FAKE_OPTIONS)

    def start_pocket(*options: str) -> Server:
        return Server.of_model(POCKET, "--kv-cache-bytes=64MiB", *options)

    is_fake = request.param == "fake"
    start = start_fake if is_fake else start_pocket
    with start() as stays:
        with stays.client() as client:
            cases = make_cases(
                client, vocab_size=VOCAB_SIZE if is_fake else 500, num_tokens=150 if is_fake else 60
            )
        yield Replicas(start=start, stays=stays, cases=cases)
        stays.assert_unharmed()
        assert stays.stop() == 0


def kill_supervisor(server: Server) -> None:
    server.scheduler.kill()


def kill_core(server: Server) -> None:
    _child(server, "tokenloom.scheduler.core").kill()


def kill_front(server: Server) -> None:
    """Which is started again; until then the other server takes the streams."""
    _child(server, "tokenloom.scheduler.front").kill()


def drain(server: Server) -> None:
    """Whose grace of 0 s is over at once."""
    server.scheduler.send_signal(signal.SIGTERM)


def _child(server: Server, module: str) -> psutil.Process:
    children = psutil.Process(server.scheduler.pid).children()
    (found,) = [child for child in children if module in child.cmdline()]
    return found


def check_that_streams_go_on(
    replicas: Replicas, harm: Callable[[Server], None], num_tokens: int
) -> None:
    """Harms the server that has all streams once each of them has so many tokens."""
    with ExitStack() as stack:
        server = stack.enter_context(replicas.start("--grace-s=0"))
        server.client().close()
        before = replicas.stays.inspect().num_steps

        def do(crowd: Crowd) -> None:
            wait_until(lambda: min(crowd.num_tokens) >= num_tokens, 120)
            assert replicas.stays.inspect().num_steps == before
            harm(server)

        crowd = Crowd(cases=replicas.cases)
        with channel_to_first(server, replicas.stays) as channel:
            crowd.run(Client(channel), do)
    crowd.assert_undisturbed()
    replicas.stays.assert_unharmed()
    assert replicas.stays.inspect().num_steps > before


@pytest.mark.parametrize("replicas", ["fake"], indirect=True)
@pytest.mark.parametrize("harm", [kill_supervisor, kill_core, kill_front, drain])
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_streams_of_a_scheduler_that_dies_go_on_at_another(
    replicas: Replicas, harm: Callable[[Server], None], num_tokens: int
) -> None:
    check_that_streams_go_on(replicas, harm, num_tokens)


@pytest.mark.parametrize("replicas", ["fake"], indirect=True)
@pytest.mark.parametrize("harm", [kill_supervisor, drain])
def test_streams_that_replicas_share_all_end_at_the_one_that_stays(
    replicas: Replicas, harm: Callable[[Server], None]
) -> None:
    with replicas.start("--grace-s=0") as server:
        server.client().close()

        def do(crowd: Crowd) -> None:
            wait_until(lambda: min(crowd.num_tokens) >= 5, 120)
            assert server.inspect().num_running > NUM_STREAMS // 4
            harm(server)

        crowd = Crowd(cases=replicas.cases)
        with Client([server.address, replicas.stays.address]) as client:

            def is_shared() -> bool:
                client.generate([5], max_tokens=1).result()
                return server.inspect().num_steps > 0

            wait_until(is_shared, 120)
            crowd.run(client, do)
    crowd.assert_undisturbed()


@pytest.mark.parametrize("replicas", ["the pocket model"], indirect=True)
def test_a_real_models_streams_go_on_at_another(replicas: Replicas) -> None:
    check_that_streams_go_on(replicas, kill_supervisor, 5)


@pytest.mark.parametrize("replicas", ["fake"], indirect=True)
def test_streams_wait_for_a_scheduler_that_is_started_again(replicas: Replicas) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(replicas.start())
        address = server.address
        server.client().close()

        def start_again(crowd: Crowd) -> None:
            wait_until(lambda: min(crowd.num_tokens) >= 5, 120)
            children = psutil.Process(server.scheduler.pid).children()
            server.scheduler.kill()
            psutil.wait_procs(children, timeout=30)
            stack.enter_context(replicas.start(f"--listen={address}"))

        crowd = Crowd(cases=replicas.cases)
        with Client(address, resume=Resume(max_attempts=200, max_pause_s=0.5)) as client:
            crowd.run(client, start_again)
        crowd.assert_undisturbed()


@pytest.mark.parametrize("replicas", ["fake"], indirect=True)
def test_without_resumption_the_transport_error_reaches_the_caller(replicas: Replicas) -> None:
    with replicas.start() as server:
        server.client().close()

        def kill(crowd: Crowd) -> None:
            wait_until(lambda: min(crowd.num_tokens) >= 1, 120)
            server.scheduler.kill()

        crowd = Crowd(cases=replicas.cases)
        with channel_to_first(server, replicas.stays) as channel:
            crowd.run(Client(channel, resume=None), kill)
    assert crowd.results == {}
    for error in crowd.errors.values():
        assert isinstance(error, Unavailable)
        assert error.reason == ""


@pytest.mark.parametrize("replicas", ["fake"], indirect=True)
def test_a_replica_with_another_model_does_not_go_on(replicas: Replicas, checkpoint: Path) -> None:
    other = Server.of_fakes(checkpoint, worker=(*FAKE_OPTIONS, "--num-blocks=2000"))
    with other, replicas.start() as server:
        server.client().close()
        other.client().close()

        def kill(crowd: Crowd) -> None:
            wait_until(lambda: min(crowd.num_tokens) >= 1, 120)
            server.scheduler.kill()

        crowd = Crowd(cases=replicas.cases)
        with channel_to_first(server, other) as channel:
            crowd.run(Client(channel), kill)
        assert len(crowd.errors) == NUM_STREAMS
        for error in crowd.errors.values():
            assert isinstance(error, Unavailable)
            cause = error.__cause__
            assert isinstance(cause, TokenloomError)
            assert cause.reason == "OTHER_MODEL"
        other.assert_unharmed()
