"""What the log says of the time in which the device ran, from events at known times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest

from tokenloom.worker.steps.timing import IDLE_S, PAUSE_REPORT_S, REPORT_S, StepClock

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Event:
    at_s: float

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.at_s - self.at_s)


class Device:
    """Runs steps one after the other and has the clock enter them."""

    def __init__(self) -> None:
        self.clock = StepClock()
        self.now_s = 0.0

    def run(self, *, after_s: float, step_s: float) -> float:
        start = Event(at_s=self.now_s + after_s)
        end = Event(at_s=start.at_s + step_s)
        self.now_s = end.at_s
        return self.clock.add(cast("torch.cuda.Event", start), cast("torch.cuda.Event", end))


@pytest.fixture
def device(caplog: pytest.LogCaptureFixture) -> Device:
    caplog.set_level("INFO")
    return Device()


def test_a_step_counts_from_its_own_events(device: Device) -> None:
    assert device.run(after_s=0.0, step_s=0.25) == pytest.approx(0.25)
    assert device.run(after_s=7.0, step_s=0.5) == pytest.approx(0.5)


def test_short_gaps_between_steps_are_time_in_which_the_device_waited(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.run(after_s=0.0, step_s=0.75 * REPORT_S)
    device.run(after_s=IDLE_S / 2, step_s=0.25 * REPORT_S - IDLE_S)
    device.run(after_s=IDLE_S / 2, step_s=0.1)
    assert caplog.messages == ["the GPU ran 98.0 % of 5.10 s: 3 steps, median 1150.000 ms"]


def test_a_time_without_requests_counts_for_nothing(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.run(after_s=0.0, step_s=1.0)
    device.run(after_s=1000.0, step_s=1.0)
    device.run(after_s=1000.0, step_s=1.0)
    assert caplog.messages == ["the GPU ran 100.0 % of 1.00 s: 1 steps, median 1000.000 ms"] * 2


def test_a_time_without_requests_may_begin_right_after_a_line(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.run(after_s=0.0, step_s=REPORT_S)
    assert len(caplog.messages) == 1
    device.run(after_s=2 * IDLE_S, step_s=0.5)
    assert len(caplog.messages) == 1


def test_short_bursts_share_a_line(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(11):
        device.run(after_s=10.0, step_s=PAUSE_REPORT_S / 10)
    assert not caplog.messages
    device.run(after_s=10.0, step_s=0.1)
    assert len(caplog.messages) == 1
