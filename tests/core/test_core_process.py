"""The core as a process, over real sockets, with fake workers that die and strangers that lie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.core.processes import ENVIRONMENT, CoreProcess, submit
from tokenloom.scheduler.config import SchedulerConfig
from tokenloom.scheduler.messages import Abort, FinishReason, Ping, RefusalReason, Stop
from tokenloom.wire import codec
from tokenloom.wire.messages import (
    PROTOCOL_VERSION,
    Configure,
    Hello,
    Progress,
    Ready,
    Shutdown,
    StepDone,
)
from tokenloom.worker.fake import FakeConfig, expected_tokens

FAKE = FakeConfig()
PROMPTS = {stream: [stream % 7 + 3] * (5 + 3 * stream) for stream in range(12)}


def expected(stream: int, count: int) -> list[int]:
    return expected_tokens(PROMPTS[stream], count, seed=stream, config=FAKE)


def test_streams_of_two_fronts_get_their_own_tokens() -> None:
    with CoreProcess() as core:
        core.start_worker()
        one, two = core.ready_front(), core.ready_front()
        one.send(*(submit(s, PROMPTS[s], 20, s) for s in range(6)))
        two.send(*(submit(s, PROMPTS[s], 30, s) for s in range(12)))
        one.until(lambda: len(one.finished) == 6)
        two.until(lambda: len(two.finished) == 12)
        assert one.tokens == {s: expected(s, 20) for s in range(6)}
        assert two.tokens == {s: expected(s, 30) for s in range(12)}
        assert {end.reason for end in two.finished.values()} == {FinishReason.LENGTH}
        inspection = one.inspect()
        assert inspection.violations == ()
        assert inspection.num_free_blocks == inspection.num_blocks


def test_aborted_and_stopped_requests_give_their_blocks_back() -> None:
    with CoreProcess() as core:
        core.start_worker("--step-ms", "5")
        front = core.ready_front()
        front.send(*(submit(s, PROMPTS[s], 3000, s) for s in range(4)))
        front.until(lambda: len(front.tokens.get(3, [])) > 3)
        front.send(*(Abort(stream=s) for s in range(3)), Stop(stream=3, num_tokens=2))
        front.until(lambda: len(front.finished) == 4)
        inspection = front.inspect()
        assert inspection.num_running == inspection.num_waiting == 0
        assert inspection.num_free_blocks == inspection.num_blocks
        assert front.finished[0].reason is FinishReason.CANCELLED
        assert front.finished[3].reason is FinishReason.STOP_STRING
        assert front.finished[3].num_completion_tokens == 2


def test_a_request_that_can_never_run_is_refused_with_the_numbers() -> None:
    with CoreProcess() as core:
        front = core.front()
        front.send(submit(0, [3], 1))
        front.until(lambda: 0 in front.refused)
        assert front.refused[0].reason is RefusalReason.NOT_READY
        core.start_worker("--max-model-tokens", "64")
        front.until(lambda: front.ready is not None)
        front.send(
            submit(1, [3] * 60, 5),
            submit(2, [], 5),
            submit(3, [FAKE.vocab_size], 5),
            submit(4, [3], 0),
        )
        front.until(lambda: len(front.refused) == 5)
        assert front.refused[1].reason is RefusalReason.TOO_LONG
        assert "60" in front.refused[1].detail
        assert "64" in front.refused[1].detail
        assert {front.refused[s].reason for s in (2, 3, 4)} == {RefusalReason.INVALID}


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    with CoreProcess(max_num_requests=1, max_waiting_requests=2) as core:
        core.start_worker("--step-ms", "5")
        front = core.ready_front()
        front.send(submit(0, [3], 3000))
        front.until(lambda: 0 in front.tokens)
        front.send(*(submit(s, [3], 10) for s in range(1, 5)))
        front.until(lambda: len(front.refused) == 2)
        for stream in (3, 4):
            assert front.refused[stream].reason is RefusalReason.QUEUE_FULL
            retry_after_s = front.refused[stream].retry_after_s
            assert retry_after_s is not None
            assert retry_after_s > 0


def test_requests_go_on_with_the_next_worker_after_kill_9() -> None:
    with CoreProcess() as core:
        worker = core.start_worker("--step-ms", "5")
        front = core.ready_front()
        epoch = front.inspect().epoch
        front.send(*(submit(s, PROMPTS[s], 100, s) for s in range(12)))
        front.until(lambda: len(front.tokens.get(11, [])) > 10)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        core.start_worker()
        front.until(lambda: len(front.finished) == 12)
        assert front.tokens == {s: expected(s, 100) for s in range(12)}
        inspection = front.inspect()
        assert inspection.epoch == epoch + 1
        assert inspection.violations == ()


def test_a_core_has_a_pulse_whether_it_works_waits_or_has_nothing_to_do() -> None:
    with CoreProcess() as core:
        front = core.front()
        front.send(Ping())
        front.until(lambda: len(front.pulses) == 1)
        worker = core.start_worker("--step-ms", "5")
        front.until(lambda: front.ready is not None)
        front.send(submit(1, PROMPTS[1], 3000, 1), Ping())
        front.until(lambda: len(front.tokens.get(1, [])) > 3)
        front.send(Ping())
        front.until(lambda: len(front.pulses) == 3)
        worker.kill()
        front.until(lambda: front.num_lost == 1)
        front.send(Ping())
        front.until(lambda: len(front.pulses) == 4)
        assert [pulse.stalled_s for pulse in front.pulses] == [0.0] * 4


def test_fronts_hear_of_a_dead_worker_before_another_comes() -> None:
    with CoreProcess() as core:
        worker = core.start_worker("--step-ms", "5")
        front = core.ready_front()
        front.send(submit(1, PROMPTS[1], 100, 1))
        front.until(lambda: len(front.tokens.get(1, [])) > 3)
        worker.send_signal(signal.SIGKILL)
        front.until(lambda: front.num_lost == 1)
        core.start_worker()
        front.until(lambda: 1 in front.finished)
        assert front.tokens[1] == expected(1, 100)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_group_that_loses_a_rank_is_told_to_leave_and_the_next_goes_on(victim: int) -> None:
    with CoreProcess(tensor_parallel=2) as core:
        ranks = [core.start_worker("--step-ms", "5") for _ in range(2)]
        front = core.ready_front()
        assert core.until_told("serving") == {rank.pid for rank in ranks}
        epoch = front.inspect().epoch
        front.send(*(submit(s, PROMPTS[s], 100, s) for s in range(12)))
        front.until(lambda: len(front.tokens.get(11, [])) > 10)
        ranks[victim].kill()
        assert core.until_told("lost") == {rank.pid for rank in ranks}
        ranks[1 - victim].wait(60)
        for _ in range(2):
            core.start_worker()
        front.until(lambda: len(front.finished) == 12)
        assert front.tokens == {s: expected(s, 100) for s in range(12)}
        inspection = front.inspect()
        assert inspection.epoch == epoch + 1
        assert inspection.violations == ()
        assert inspection.num_free_blocks == inspection.num_blocks


def test_a_rank_that_stands_still_is_told_to_whoever_can_kill_it() -> None:
    with CoreProcess(tensor_parallel=2, step_timeout_s=0.5) as core:
        ranks = [core.start_worker("--step-ms", "5") for _ in range(2)]
        front = core.ready_front()
        front.send(submit(1, PROMPTS[1], 3000, 1))
        front.until(lambda: len(front.tokens.get(1, [])) > 10)
        ranks[1].send_signal(signal.SIGSTOP)
        assert core.until_told("lost") == {rank.pid for rank in ranks}
        front.until(lambda: front.num_lost == 1)


def test_an_idle_worker_that_stands_still_is_noticed() -> None:
    with CoreProcess(heartbeat_timeout_s=0.5) as core:
        worker = core.start_worker()
        front = core.ready_front()
        worker.send_signal(signal.SIGSTOP)
        assert core.until_told("lost") == {worker.pid}
        front.until(lambda: front.num_lost == 1)


@pytest.mark.parametrize("kind", ["kill", "raise"])
def test_a_fatal_request_fails_alone(kind: str) -> None:
    fatal = 400
    with CoreProcess() as core:
        options = ("--fatal-token-id", str(fatal), "--fatal-index", "2", "--crash", kind)
        core.start_worker("--step-ms", "1", *options)
        front = core.ready_front()
        front.send(*(submit(s, PROMPTS[s], 300, s) for s in range(12)))
        front.until(lambda: len(front.tokens.get(11, [])) > 2)
        front.send(submit(99, [fatal], 50))
        for num_lost in (1, 2, 3):
            front.until(lambda lost=num_lost: front.num_lost == lost)  # type: ignore[misc]
            core.start_worker(*options)
        front.until(lambda: len(front.finished) == 13)
        assert front.finished[99].reason is FinishReason.CRASH
        assert len(front.tokens.pop(99)) <= 2  # what was in flight died with the worker
        assert front.tokens == {s: expected(s, 300) for s in range(12)}
        assert front.inspect().violations == ()


def test_one_crash_too_many_ends_the_core_with_the_numbers(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with CoreProcess(max_crashes=1) as core:
        front = core.front()
        for num_lost in (1, 2):
            worker = core.start_worker()
            front.until(lambda: front.ready is not None)
            worker.kill()
            front.until(lambda lost=num_lost: front.num_lost == lost)  # type: ignore[misc]
        assert core.process.wait(60) == 1
        errors = capfd.readouterr().err
        assert "2 groups of workers were lost within 600 s" in errors
        assert "at most 1 may be" in errors


def test_an_idle_worker_that_dies_is_noticed() -> None:
    with CoreProcess() as core:
        worker = core.start_worker()
        front = core.ready_front()
        worker.send_signal(signal.SIGKILL)
        front.until(lambda: front.num_lost == 1)


@pytest.mark.parametrize("offer", [{"num_blocks": 0}, {"max_step_tokens": 1}])
def test_a_worker_that_offers_too_little_is_told_to_leave(offer: dict[str, int]) -> None:
    with CoreProcess() as core:
        worker = core.context.socket(zmq.DEALER)
        worker.connect(core.config.worker_endpoint)
        worker.send(
            codec.encode(Hello(protocol_version=PROTOCOL_VERSION, pid=1, device="cpu", address=""))
        )
        configure = codec.decode_to_worker(worker.recv())
        assert isinstance(configure, Configure)
        ready = Ready(
            epoch=configure.epoch,
            num_blocks=100,
            block_size=16,
            vocab_size=97,
            max_model_tokens=64,
            max_step_tokens=8192,
            weights_bytes=0,
            kv_bytes=0,
        )
        worker.send(codec.encode(msgspec.structs.replace(ready, **offer)))
        assert codec.decode_to_worker(worker.recv()) == Shutdown()
        core.start_worker()
        core.ready_front()


def test_strangers_and_garbage_on_the_worker_socket_are_dropped() -> None:
    """A good stream is unharmed by frames that are garbage, stale, or of somebody else."""
    with CoreProcess() as core:
        core.start_worker("--step-ms", "5")
        front = core.ready_front()
        epoch = front.inspect().epoch
        front.send(submit(5, PROMPTS[5], 100, 5))
        front.until(lambda: len(front.tokens.get(5, [])) > 3)
        stranger = core.context.socket(zmq.DEALER)
        stranger.connect(core.config.worker_endpoint)
        done = StepDone(
            epoch=epoch,
            step_id=20,
            tokens=b"\x07\0\0\0",
            logprobs=(),
            faulty_rows=b"",
            compute_s=0.0,
        )
        frames = [
            b"",
            b"garbage",
            os.urandom(1000),
            b"\x9f" * 10_000,
            codec.encode(done)[:-5],
            codec.encode(done),
            codec.encode(Progress(epoch=epoch, phase="loading", fraction=0.5)),
            codec.encode(Hello(protocol_version=99, pid=1, device="cpu", address="")),
            codec.encode(Hello(protocol_version=PROTOCOL_VERSION, pid=1, device="cpu", address="")),
        ]
        for frame in frames:
            stranger.send(frame)
        stranger.send_multipart([b"two", b"frames"])
        front.until(lambda: 5 in front.finished)
        assert front.tokens[5] == expected(5, 100)
        inspection = front.until_dropped(len(frames) + 1)
        assert inspection.num_dropped_frames == len(frames) + 1
        assert inspection.epoch == epoch
        assert inspection.violations == ()


def test_garbage_on_the_front_socket_is_dropped() -> None:
    with CoreProcess() as core:
        core.start_worker()
        stranger = core.context.socket(zmq.DEALER)
        stranger.connect(core.config.core_endpoint)
        stranger.send(b"garbage")
        front = core.ready_front()
        front.socket.send(b"\xc1")
        front.send(submit(1, PROMPTS[1], 10, 1))
        front.until(lambda: 1 in front.finished)
        assert front.tokens[1] == expected(1, 10)
        assert front.until_dropped(2).num_dropped_frames == 2


def test_requests_of_a_front_that_is_gone_end() -> None:
    with CoreProcess() as core:
        core.start_worker("--step-ms", "2")
        gone, other = core.ready_front(), core.ready_front()
        gone.send(submit(1, PROMPTS[1], 3000))
        gone.until(lambda: 1 in gone.tokens)
        gone.socket.close()
        other.send(submit(1, PROMPTS[1], 50, 1))
        other.until(lambda: 1 in other.finished)
        inspection = other.inspect()
        assert inspection.num_running == 0
        assert inspection.num_free_blocks == inspection.num_blocks


def test_sigterm_shuts_down_core_and_worker() -> None:
    with CoreProcess() as core:
        worker = core.start_worker()
        core.ready_front()
        core.process.send_signal(signal.SIGTERM)
        assert core.process.wait(30) == 0
        assert worker.wait(30) == 0


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_run_dir_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    config = SchedulerConfig(model="fake", run_dir=str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-m", "tokenloom.scheduler.core", config.to_json()],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "must be 700" in result.stderr
