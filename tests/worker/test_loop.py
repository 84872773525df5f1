from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.core_socket import CoreSocket, worker_process
from tests.worker.driver import Driver, configuration
from tokenloom.wire.codec import encode
from tokenloom.wire.messages import (
    PROTOCOL_VERSION,
    Failed,
    Hello,
    Progress,
    Ready,
    Shutdown,
    StepDone,
)
from tokenloom.worker.fake import FakeConfig, expected_tokens


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/worker.sock"


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    return expected_tokens(prompt, num_tokens, seed=0, config=FakeConfig())


def test_hello_configure_ready_steps_and_shutdown(endpoint: str) -> None:
    with CoreSocket(endpoint) as core, worker_process(endpoint) as process:
        hello = core.expect(Hello)
        assert (hello.protocol_version, hello.pid) == (PROTOCOL_VERSION, process.pid)
        core.send(configuration(epoch=4))
        assert core.expect(Progress).epoch == 4
        ready = core.expect(Ready)
        assert ready.epoch == 4
        assert Driver(core.step, ready).generate([[1, 2, 3]], 5) == [expected([1, 2, 3], 5)]
        core.send(Shutdown())
        assert process.wait(10) == 0


def test_hello_is_repeated_until_somebody_answers(endpoint: str) -> None:
    with worker_process(endpoint), CoreSocket(endpoint) as core:
        assert core.expect(Hello) == core.expect(Hello)


def test_garbage_and_stale_frames_are_dropped(endpoint: str) -> None:
    with CoreSocket(endpoint) as core, worker_process(endpoint):
        core.expect(Hello)
        for garbage in (
            b"",
            b"\xc1",
            b"\x00" * 1000,
            encode(configuration())[:-3],
            b"\x91\xa4Step",
        ):
            core.send_raw(garbage)
        core.send_raw(b"two", b"parts")
        ready = core.configure(configuration(epoch=2))
        driver = Driver(core.step, ready)
        truncated = encode(Driver(core.step, ready).plan({}))[:-5]
        for garbage in (b"garbage", truncated, encode(configuration(epoch=1))):
            core.send_raw(garbage)
        assert driver.generate([[1, 2, 3]], 5) == [expected([1, 2, 3], 5)]


def test_a_step_of_another_epoch_is_dropped(endpoint: str) -> None:
    with CoreSocket(endpoint) as core, worker_process(endpoint):
        core.expect(Hello)
        old = Driver(core.step, core.configure(configuration(epoch=1)))
        slot = old.add([1, 2, 3])
        new = Driver(core.step, core.configure(configuration(epoch=2)))
        core.send(old.plan({slot: 3}))
        assert new.generate([[4]], 3) == [expected([4], 3)]


def test_a_new_epoch_forgets_the_requests(endpoint: str) -> None:
    with CoreSocket(endpoint) as core, worker_process(endpoint):
        core.expect(Hello)
        for epoch in (1, 2, 5):
            driver = Driver(core.step, core.configure(configuration(epoch=epoch)))
            slot = driver.add([1, 2, 3])
            driver.run({slot: 4})
            assert driver.slots[slot].completion == expected([1, 2, 3], 4)


def test_a_broken_step_ends_the_worker_with_its_reason(endpoint: str) -> None:
    with CoreSocket(endpoint) as core, worker_process(endpoint) as process:
        core.expect(Hello)
        driver = Driver(core.step, core.configure(configuration(epoch=3)))
        driver.add([99999])
        core.send(driver.plan({}))
        failed = core.expect(Failed)
        assert failed.epoch == 3
        assert "99999" in failed.error
        assert process.wait(10) == 1


def test_a_core_that_comes_back_hears_hello_again(endpoint: str) -> None:
    with worker_process(endpoint) as process:
        for epoch in (7, 1):  # a fresh core counts from the start
            with CoreSocket(endpoint) as core:
                assert core.expect(Hello).pid == process.pid
                driver = Driver(core.step, core.configure(configuration(epoch=epoch)))
                assert driver.generate([[4]], 3) == [expected([4], 3)]


def test_sigterm_ends_the_worker_at_once_with_0(endpoint: str) -> None:
    with CoreSocket(endpoint) as core, worker_process(endpoint) as process:
        core.expect(Hello)
        core.configure(configuration())
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


LATE_SIGNAL = """
import atexit, os, signal, sys
from tokenloom.worker.fake import main
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_while_the_worker_exits_is_not_shown_as_an_error(endpoint: str) -> None:
    with CoreSocket(endpoint) as core:
        process = subprocess.Popen(
            [sys.executable, "-c", LATE_SIGNAL, "--connect", endpoint], stderr=subprocess.PIPE
        )
        core.expect(Hello)
        core.configure(configuration())
        core.send(Shutdown())
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert b"Traceback" not in errors


def test_two_steps_in_flight_are_answered_in_order(endpoint: str) -> None:
    with CoreSocket(endpoint) as core, worker_process(endpoint, "--step-ms", "20"):
        core.expect(Hello)
        driver = Driver(core.step, core.configure(configuration()))
        slot = driver.add([1, 2, 3])
        core.send(driver.plan({slot: 3}))
        # What the first samples is not known here; the second computes it all the same.
        state = driver.slots[slot]
        state.num_computed = 3
        state.tokens.append(0)
        core.send(driver.plan({slot: 1}))
        done = [core.expect(StepDone), core.expect(StepDone)]
        assert [each.step_id for each in done] == [1, 2]
        tokens = [int.from_bytes(each.tokens, "little") for each in done]
        assert tokens == expected([1, 2, 3], 2)
        assert done[0].compute_s == 0.02


BROKEN_DEVICE = """
import sys
from tokenloom.worker import fake

def fail(self):
    raise RuntimeError("the device is lost")

fake._FakePending.remaining_s = fake._FakePending.result = fail
sys.exit(fake.main(sys.argv[1:]))
"""


def test_a_device_that_fails_under_a_step_is_told_to_the_core(endpoint: str) -> None:
    with CoreSocket(endpoint) as core:
        process = subprocess.Popen([sys.executable, "-c", BROKEN_DEVICE, "--connect", endpoint])
        core.expect(Hello)
        driver = Driver(core.step, core.configure(configuration(epoch=3)))
        core.send(driver.plan({driver.add([1, 2, 3]): 3}))
        failed = core.expect(Failed)
        assert failed.epoch == 3
        assert "the device is lost" in failed.error
        assert process.wait(10) == 1
