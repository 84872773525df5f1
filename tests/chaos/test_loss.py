"""Workers die, hang and lie while 32 streams run: each stream's tokens are an undisturbed run's.

Real processes throughout: `tokenloom serve` with the pocket model, whole and divided among two
ranks, and with groups of fake workers, which wait for each other in each step as real ranks do.
After each case every block is back and all workers live; after the last one no process and no
socket is left.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import psutil
import pytest
import zmq
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.e2e.server import START_TIMEOUT_S, Server, wait_until
from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.client import Client, Delta, Pause, ServerError, TokenloomError
from tokenloom.wire import codec
from tokenloom.wire.messages import PROTOCOL_VERSION, Failed, Hello, Ready, StepDone, ToCore
from tokenloom.worker.fake import FakeConfig, expected_tokens

POCKET = Path(__file__).parents[2] / "models" / "pocket"
NUM_STREAMS = 32
VOCAB_SIZE = 300
FATAL = 299
FAKE = FakeConfig(vocab_size=VOCAB_SIZE)
OFTEN = ("--max-crashes=1000", f"--max-num-requests={NUM_STREAMS}", "--max-step-tokens=64")
FAKE_OPTIONS = ("--step-ms=4", f"--vocab-size={VOCAB_SIZE}", "--load-s=0.3")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request and the tokens that an undisturbed run gives it."""

    prompt: list[int]
    seed: int
    temperature: float
    tokens: list[int]


@dataclass(kw_only=True)
class Loom:
    """A server, and the streams that it is to serve whatever happens."""

    server: Server
    num_ranks: int
    cases: list[Case]

    def await_serving(self) -> None:
        """Waits until there are as many workers as there should be, and they serve."""

        def are_there() -> bool:
            return len(self.server.workers()) == self.num_ranks

        wait_until(are_there, START_TIMEOUT_S, alive=self.server.scheduler)
        self.server.client().close()

    def worker(self, rank: int) -> psutil.Process:
        """Returns a rank's process."""
        return psutil.Process(self.server.inspect().pids[rank])

    def await_group(self, old: set[int]) -> set[int]:
        """Waits until a group of other processes is about to load; returns them."""
        found: list[set[int]] = []

        def has_come() -> bool:
            found.append(set(self.server.inspect().pids))
            return len(found[-1]) == self.num_ranks and found[-1].isdisjoint(old)

        wait_until(has_come, START_TIMEOUT_S, alive=self.server.scheduler)
        return found[-1]


class Crowd:
    """Streams that run at once; the harm is done while they do."""

    num_pauses = 0
    """That any stream heard of."""

    def __init__(self, loom: Loom) -> None:
        self.loom = loom
        self.tokens: list[list[int]] = [[] for _ in loom.cases]
        self.wrong: list[str] = []

    def run(self, client: Client, place: int) -> None:
        case, tokens = self.loom.cases[place], self.tokens[place]
        try:
            stream = client.generate(
                case.prompt,
                seed=case.seed,
                temperature=case.temperature,
                max_tokens=len(case.tokens),
                ignore_eos=True,
                timeout_s=250,
            )
            for event in stream.events():  # which checks that indices follow each other
                match event:
                    case Delta():
                        tokens += event.token_ids
                    case Pause():
                        self.num_pauses += 1
        except TokenloomError as error:
            self.wrong.append(f"stream {place}: {error!r} after {len(tokens)} tokens")

    def until(self, condition: Callable[[list[int]], bool]) -> None:
        """Waits for a condition on the streams' lengths."""
        wait_until(lambda: condition([len(tokens) for tokens in self.tokens]), 120)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Starts all streams; at the end all have ended well."""
        with self.loom.server.client() as client:
            threads = [
                threading.Thread(target=self.run, args=(client, place), daemon=True)
                for place in range(len(self.loom.cases))
            ]
            for thread in threads:
                thread.start()
            yield
            for thread in threads:
                thread.join(250)
            assert not any(thread.is_alive() for thread in threads)
        assert self.wrong == []

    @property
    def is_over(self) -> bool:
        pairs = zip(self.tokens, self.loom.cases, strict=True)
        return all(len(tokens) == len(case.tokens) for tokens, case in pairs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Starts all streams; at the end each has the tokens of an undisturbed run."""
        with self.begun():
            yield
        for place, (tokens, case) in enumerate(zip(self.tokens, self.loom.cases, strict=True)):
            assert tokens == case.tokens, f"stream {place} of {case}"


def fake_cases(num_tokens: int) -> list[Case]:
    draw = random.Random(5)
    cases = []
    for seed in range(NUM_STREAMS):
        prompt = [draw.randrange(FATAL) for _ in range(draw.randint(1, 400))]
        tokens = expected_tokens(prompt, num_tokens, seed=seed, config=FAKE)
        cases.append(Case(prompt=prompt, seed=seed, temperature=1.0, tokens=tokens))
    return cases


def pocket_cases(server: Server, num_tokens: int) -> list[Case]:
    """Half of them greedy, half drawn; the tokens are what the server itself says undisturbed."""
    draw = random.Random(5)
    cases = [
        Case(
            prompt=[draw.randrange(4, 500) for _ in range(draw.randint(1, 200))],
            seed=seed,
            temperature=float(seed % 2),
            tokens=[0] * num_tokens,
        )
        for seed in range(NUM_STREAMS)
    ]
    crowd = Crowd(Loom(server=server, num_ranks=1, cases=cases))
    with crowd.begun():
        pass
    return [
        Case(prompt=c.prompt, seed=c.seed, temperature=c.temperature, tokens=tokens)
        for c, tokens in zip(cases, crowd.tokens, strict=True)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level_tokenizer())


@pytest.fixture(scope="module")
def fakes(checkpoint: Path) -> Iterator[Loom]:
    """Two fake ranks."""
    options = (*OFTEN, "--tensor-parallel=2", "--step-timeout-s=1")
    with Server.of_fakes(checkpoint, *options, worker=FAKE_OPTIONS) as server:
        yield from serving(Loom(server=server, num_ranks=2, cases=fake_cases(150)))


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def pocket(request: pytest.FixtureRequest) -> Iterator[Loom]:
    """The pocket model."""
    ranks = f"--tensor-parallel={request.param}"
    options = (*OFTEN, ranks, "--step-timeout-s=2", "--kv-cache-bytes=64MiB")
    with Server.of_model(POCKET, *options) as server:
        cases = pocket_cases(server, 60)
        yield from serving(Loom(server=server, num_ranks=request.param, cases=cases))


def serving(loom: Loom) -> Iterator[Loom]:
    """Yields a server whose workers are there; at its end nothing is left of it."""
    loom.await_serving()
    yield loom
    processes = psutil.Process(loom.server.scheduler.pid).children()
    assert loom.server.stop() == 0
    assert psutil.wait_procs(processes, timeout=30)[1] == []
    assert list(loom.server.run_dir.iterdir()) == []


def kill_in_decode(loom: Loom, crowd: Crowd, rank: int, draw: random.Random) -> None:
    first = draw.randint(1, 20)
    crowd.until(lambda lengths: min(lengths) >= first)
    loom.worker(rank).kill()


def kill_in_prefill(loom: Loom, crowd: Crowd, rank: int, draw: random.Random) -> None:
    """As soon as all requests have come: their prompts take many steps."""
    assert not crowd.is_over

    def have_come() -> bool:
        inspection = loom.server.inspect()
        return inspection.num_running + inspection.num_waiting == NUM_STREAMS

    wait_until(have_come, 60)
    time.sleep(0.01 * draw.random())
    loom.worker(rank).kill()


def kill_while_loading(loom: Loom, crowd: Crowd, rank: int, draw: random.Random) -> None:
    """Once before it said anything, perhaps, and once when all have come and load."""
    old = set(loom.server.inspect().pids)
    kill_in_decode(loom, crowd, rank, draw)

    def are_there() -> bool:
        pids = {worker.pid for worker in loom.server.workers()}
        return len(pids) == loom.num_ranks and pids.isdisjoint(old)

    wait_until(are_there, START_TIMEOUT_S, alive=loom.server.scheduler)
    workers = loom.server.workers()
    old |= {worker.pid for worker in workers}
    time.sleep(0.5 * draw.random())
    workers[rank].kill()
    loom.await_group(old)
    loom.worker(rank).kill()


def stop_in_decode(loom: Loom, crowd: Crowd, rank: int, draw: random.Random) -> None:
    first = draw.randint(1, 5)
    crowd.until(lambda lengths: min(lengths) >= first)
    loom.worker(rank).suspend()


def kill_twice(loom: Loom, crowd: Crowd, rank: int, draw: random.Random) -> None:
    old = set(loom.server.inspect().pids)
    kill_in_decode(loom, crowd, rank, draw)
    loom.await_group(old)
    before = sum(len(tokens) for tokens in crowd.tokens)
    crowd.until(lambda lengths: sum(lengths) > before + NUM_STREAMS)
    loom.worker(rank).kill()


def lie_and_kill(loom: Loom, crowd: Crowd, rank: int, draw: random.Random) -> None:
    """Garbage, frames of old epochs and of strangers come before, while and after a rank dies."""
    epoch = loom.server.inspect().epoch
    stale = [
        StepDone(epoch=each, step_id=1, tokens=b"", logprobs=(), faulty_rows=b"", compute_s=0.0)
        for each in (epoch - 1, epoch, epoch + 1)
    ]
    others: list[ToCore] = [Failed(epoch=epoch + 1, error="a lie"), _ready(epoch + 1)]
    frames = [b"", b"\xc1", draw.randbytes(1000)]
    frames += [codec.encode(message) for message in stale]
    frames += [codec.encode(message) for message in others]
    old_hello = Hello(protocol_version=PROTOCOL_VERSION - 1, pid=1, device="cpu", address="")
    frames += [codec.encode(old_hello), codec.encode(stale[0])[:-3]]
    stranger = loom.server.context.socket(zmq.DEALER)
    stranger.connect(f"ipc://{loom.server.run_dir}/worker.sock")
    before = loom.server.inspect().num_dropped_frames
    try:
        for moment in range(30):
            for frame in frames:
                stranger.send(frame)
            if moment == 10:
                kill_in_decode(loom, crowd, rank, draw)
            time.sleep(0.02)
        wait_until(lambda: loom.server.inspect().num_dropped_frames >= before + 300, 60)
    finally:
        stranger.close(linger=0)


def _ready(epoch: int) -> Ready:
    return Ready(
        epoch=epoch,
        num_blocks=1,
        block_size=1,
        vocab_size=1,
        max_model_tokens=1,
        max_step_tokens=8192,
        weights_bytes=0,
        kv_bytes=0,
    )


Harm: TypeAlias = Callable[[Loom, Crowd, int, random.Random], None]

HARMS: tuple[Harm, ...] = (
    kill_in_decode,
    kill_in_prefill,
    kill_while_loading,
    stop_in_decode,
    kill_twice,
    lie_and_kill,
)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_streams_of_fake_ranks_go_on_as_if_nothing_had_happened(
    fakes: Loom, harm: Harm, seed: int
) -> None:
    survive(fakes, harm, rank=seed % fakes.num_ranks, seed=seed)


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_streams_of_a_model_go_on_as_if_nothing_had_happened(pocket: Loom, harm: Harm) -> None:
    for rank in range(pocket.num_ranks):
        survive(pocket, harm, rank=rank, seed=rank)


def survive(loom: Loom, harm: Harm, *, rank: int, seed: int) -> None:
    epoch = loom.server.inspect().epoch
    crowd = Crowd(loom)
    with crowd.running():
        harm(loom, crowd, rank, random.Random(seed))
        assert not crowd.is_over  # else the harm came too late to be any
    assert crowd.num_pauses > 0
    loom.server.assert_unharmed()
    assert loom.server.inspect().epoch > epoch
    loom.await_serving()


@pytest.mark.parametrize(("kind", "rank"), [("kill", 0), ("kill", 1), ("raise", 1), ("hang", 1)])
def test_a_poisoned_request_fails_alone(checkpoint: Path, kind: str, rank: int) -> None:
    """Within the default budget of 3 crashes: its third is its last."""
    poison = (f"--fatal-token-id={FATAL}", f"--crash={kind}", f"--crash-rank={rank}")
    options = ("--tensor-parallel=2", "--step-timeout-s=0.5")
    with Server.of_fakes(checkpoint, *options, worker=(*FAKE_OPTIONS, *poison)) as server:
        loom = Loom(server=server, num_ranks=2, cases=fake_cases(100))
        loom.await_serving()
        epoch = server.inspect().epoch
        crowd = Crowd(loom)
        with crowd.running(), server.client() as client:
            crowd.until(lambda lengths: min(lengths) >= 1)
            with pytest.raises(ServerError) as fault:
                client.generate([5, FATAL], max_tokens=5, timeout_s=250).result()
            assert fault.value.code is grpc.StatusCode.INTERNAL
            assert fault.value.reason == "MODEL_CRASH"
            assert len(fault.value.metadata["fault_id"]) == 32
        server.assert_unharmed()
        assert server.inspect().epoch == epoch + 3
        assert server.stop() == 0


def test_a_server_whose_workers_crash_too_often_ends_and_leaves_nothing(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Server.of_fakes(checkpoint, "--max-crashes=1", worker=FAKE_OPTIONS) as server:
        loom = Loom(server=server, num_ranks=1, cases=[])
        loom.await_serving()
        old = loom.worker(0)
        old.kill()
        loom.await_group({old.pid})
        loom.await_serving()
        processes = psutil.Process(server.scheduler.pid).children()
        loom.worker(0).kill()
        assert server.scheduler.wait(60) == 1
        assert psutil.wait_procs(processes, timeout=30)[1] == []
    assert "at most 1 may be" in capfd.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_streams_that_finish_after_sigterm_do_so_without_a_worker_too(
    checkpoint: Path, rank: int
) -> None:
    options = ("--tensor-parallel=2", "--grace-s=200")
    with Server.of_fakes(checkpoint, *options, worker=FAKE_OPTIONS) as server:
        loom = Loom(server=server, num_ranks=2, cases=fake_cases(150))
        loom.await_serving()
        crowd = Crowd(loom)
        with crowd.running():
            crowd.until(lambda lengths: min(lengths) >= 5)
            server.scheduler.send_signal(signal.SIGTERM)
            time.sleep(0.05 * rank)
            loom.worker(rank).kill()
            assert not crowd.is_over
        assert crowd.num_pauses > 0
        assert server.scheduler.wait(60) == 0


def test_a_rank_that_stands_still_before_the_others_come_is_started_again(
    checkpoint: Path,
) -> None:
    options = ("--tensor-parallel=2", "--heartbeat-timeout-s=1")
    with Server.of_fakes(checkpoint, *options, worker=FAKE_OPTIONS) as server:
        loom = Loom(server=server, num_ranks=2, cases=[])
        wait_until(lambda: len(server.workers()) == 2, START_TIMEOUT_S)
        first, second = server.workers()
        second.suspend()
        wait_until(lambda: first.pid in server.inspect().pids, START_TIMEOUT_S)
        first.suspend()
        loom.await_group({first.pid, second.pid})
        loom.await_serving()


def test_a_core_that_stands_still_is_not_alive_until_it_goes_on(checkpoint: Path) -> None:
    options = ("--heartbeat-timeout-s=1",)
    with Server.of_fakes(checkpoint, *options, worker=FAKE_OPTIONS) as server:
        Loom(server=server, num_ranks=1, cases=[]).await_serving()
        (core,) = server.children("tokenloom.scheduler.core")
        with grpc.insecure_channel(server.address) as channel:
            stub: Any = HealthStub(channel)

            def lives() -> bool:
                response = stub.Check(HealthCheckRequest(service="liveness"))
                return bool(response.status == HealthCheckResponse.SERVING)

            assert lives()
            core.suspend()
            wait_until(lambda: not lives(), 60)
            core.resume()
            wait_until(lives, 60)


def test_ranks_that_outlive_their_scheduler_serve_the_next() -> None:
    options = ("--model", str(POCKET), "--tensor-parallel=2")
    with Server("scheduler", *options) as server:
        workers = ("--device=cpu", "--kv-cache-bytes=64MiB", "--cpu-threads=1")
        endpoint = f"--connect=ipc://{server.run_dir}/worker.sock"
        ranks = [server.start("tokenloom.worker", endpoint, *workers) for _ in range(2)]

        def answer() -> list[int]:
            with server.client() as client:
                result = client.generate([5, 6, 7], seed=1, max_tokens=20, timeout_s=60).result()
            return list(result.token_ids)

        before, epoch = answer(), server.inspect().epoch
        server.restart_scheduler()
        assert answer() == before
        assert server.inspect().epoch > epoch
        assert set(server.inspect().pids) == {rank.pid for rank in ranks}
        assert server.stop() == 0
        assert [rank.wait(30) for rank in ranks] == [0, 0]


def test_kill_9_of_the_supervisor_leaves_no_process_behind(checkpoint: Path) -> None:
    options = ("--tensor-parallel=2",)
    with Server.of_fakes(checkpoint, *options, worker=FAKE_OPTIONS) as server:
        Loom(server=server, num_ranks=2, cases=[]).await_serving()
        processes = psutil.Process(server.scheduler.pid).children()
        assert len(processes) == 4
        os.kill(processes[-1].pid, signal.SIGSTOP)
        server.scheduler.kill()
        assert psutil.wait_procs(processes, timeout=30)[1] == []
