import os
import time

from tokenloom.wire.spin import Spin, default_spin_us

MINUTE_US = 60_000_000
SHORT_US = 1000


def test_results_that_follow_each_other_are_waited_for_awake() -> None:
    spin = Spin(MINUTE_US)
    spin.result()
    assert not spin.goes_on()  # what comes after a single one is not known
    spin.result()
    assert spin.goes_on()


def test_results_far_apart_let_it_sleep() -> None:
    spin = Spin(SHORT_US)
    for _ in range(3):
        spin.result()
        assert not spin.goes_on()
        time.sleep(2 * SHORT_US / 1e6)


def test_it_sleeps_when_no_more_results_come() -> None:
    spin = Spin(SHORT_US)
    while not spin.goes_on():
        spin.result()
    time.sleep(2 * SHORT_US / 1e6)
    assert not spin.goes_on()


def test_without_a_window_it_always_sleeps() -> None:
    spin = Spin(0)
    spin.result()
    spin.result()
    assert not spin.goes_on()


def test_a_process_with_few_cpus_always_sleeps() -> None:
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        assert default_spin_us() == 0
    finally:
        os.sched_setaffinity(0, cpus)
