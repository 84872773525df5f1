"""Model, KV pool, persistent batch and sampler as one Runner for the loop.

    launch(step)   check ─▶ put changes in place ─▶ forward ─▶ sample ─▶ append ─▶ copy back
                   host     └──────────────── device, nothing waits ───────────────────┘

On CUDA `launch` returns when the work is queued: a step may follow before the
one before it is done, and its tokens are read on the device. On a CPU the
result is there when `launch` returns.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from tokenloom.wire.messages import Configure, Ready, Step, StepDone
from tokenloom.worker.errors import LoadError, ProtocolError
from tokenloom.worker.loading import (
    LoadedModel,
    ModelAsked,
    find_device,
    load_model,
    max_model_tokens,
    max_step_tokens,
)
from tokenloom.worker.ranks import ALONE
from tokenloom.worker.ranks.meeting import Meeting
from tokenloom.worker.steps.computing import Rows, compute
from tokenloom.worker.steps.graphs import StepGraphs
from tokenloom.worker.steps.results import Outcome, step_done
from tokenloom.worker.steps.shapes import FixedSteps
from tokenloom.worker.steps.slots import Limits, Slots
from tokenloom.worker.steps.timing import StepClock
from tokenloom.worker.steps.warmup import warm_up_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenloom.worker.options import WorkerOptions
    from tokenloom.worker.ranks import Ranks

_POLL_S = 50e-6
"""How often the loop looks whether the device is done: short beside a step of milliseconds."""


class ModelRunner:
    """Computes steps with a real model."""

    def __init__(self, options: WorkerOptions) -> None:
        """Raises LoadError if the machine has no such device."""
        self._options = options
        self.device = find_device(options.device)
        self._meeting = None if options.host is None else Meeting(options.host)
        self._clock = StepClock()
        self._loaded: LoadedModel | None = None
        self._rows: Rows | None = None
        self._slots: Slots | None = None

    @torch.inference_mode()
    def configure(self, configure: Configure, report: Callable[[str, float], None]) -> Ready:
        """Loads the model unless it is loaded already, and starts from empty slots.

        Raises:
            LoadError: It cannot be served here.
            MeetingError: The other ranks are not there.
        """
        self._slots = None
        with ExitStack() as stack:  # at its end the weights are there
            join = partial(self._join, configure, report)
            loaded = self._held(configure)
            if loaded is None:
                self._rows = self._loaded = None  # before the next is loaded: both may not fit
                loading = load_model(configure, self._options, self.device, report, join)
                loaded = stack.enter_context(loading)
            elif configure.world_size > 1:
                self._rows = None  # what was captured speaks to the group of the last epoch
                loaded = loaded.among(join())
            self._loaded = loaded
            limits = _limits(configure, loaded, self.device)
            loaded.decoder.ranks.prepare(
                limits.max_step_tokens,
                loaded.config.hidden_size,
                loaded.decoder.embedding.dtype,
            )
            if self._rows is None or self._rows.limits != limits:
                self._rows = None
                self._rows = self._prepare(configure.epoch, limits, loaded, report)
        self._slots = Slots(limits)
        self._clock = StepClock()
        return Ready(
            epoch=configure.epoch,
            num_blocks=limits.num_blocks,
            block_size=loaded.attention.block_size,
            vocab_size=loaded.config.vocab_size,
            max_model_tokens=max_model_tokens(configure, loaded.config),
            max_step_tokens=limits.max_step_tokens,
            weights_bytes=loaded.weights_bytes,
            kv_bytes=loaded.pool.num_bytes,
            fingerprint=loaded.fingerprint,
        )

    @property
    def address(self) -> str:
        """Where other ranks can meet at this one; empty if they cannot."""
        return "" if self._meeting is None else self._meeting.address

    @torch.inference_mode()
    def launch(self, step: Step) -> _HostPending | _DevicePending:
        """Starts a step. Raises ProtocolError if it contradicts those before it."""
        if self._slots is None:
            raise ProtocolError(f"step {step.step_id} came before Configure")
        loaded, rows, slots = self._loaded, self._rows, self._slots
        assert loaded is not None
        assert rows is not None
        changes = slots.apply(step)
        if self.device.type != "cuda":
            start_s = time.perf_counter()
            outcome = compute(changes, loaded, rows, slots)
            seconds = time.perf_counter() - start_s
            return _HostPending(done=step_done(step, outcome, seconds))
        start, end = _event(), _event()
        outcome = compute(changes, loaded, rows, slots, start)
        outcome = None if outcome is None else outcome.download()
        end.record()
        return _DevicePending(step=step, outcome=outcome, start=start, end=end, clock=self._clock)

    def _join(self, configure: Configure, report: Callable[[str, float], None]) -> Ranks:
        """Returns the group of an epoch, once all ranks are there.

        Raises:
            LoadError: This worker can only serve alone.
            MeetingError: The other ranks are not there.
        """
        if configure.world_size == 1:
            return ALONE
        if self._meeting is None:
            raise LoadError(f"world_size is {configure.world_size}; this worker serves alone")
        report("meeting the other ranks", 0.0)
        return self._meeting.join(
            epoch=configure.epoch,
            rank=configure.rank,
            num_ranks=configure.world_size,
            rendezvous=configure.rendezvous,
            device=self.device,
        )

    def _prepare(
        self,
        epoch: int,
        limits: Limits,
        loaded: LoadedModel,
        report: Callable[[str, float], None],
    ) -> Rows:
        """Returns empty rows; on CUDA, kernels are compiled and steps captured."""
        rows = Rows.empty(limits, loaded.decoder, self.device)
        report("loading kernels", 0.0)
        with self._compiling(limits, loaded):
            loaded.attention.load()
        if self.device.type != "cuda":
            return rows
        report("warming up", 0.0)
        self._rows, self._slots = rows, Slots(limits)
        for step in warm_up_steps(epoch, limits):
            self.launch(step).result()
        report("warming up", 1.0)
        if not (self._options.graphs and loaded.attention.capturable):
            return rows
        steps = FixedSteps(loaded, rows.batch, rows.sampler, limits)
        graphs = StepGraphs(steps, self.device)
        graphs.capture(lambda fraction: report("capturing graphs", fraction))
        return replace(rows, graphs=graphs)

    def _compiling(self, limits: Limits, loaded: LoadedModel) -> AbstractContextManager[None]:
        """Returns what compiles the kernels of steps beside what runs within it."""
        if self.device.type != "cuda" or find_spec("triton") is None:
            return nullcontext()
        # Triton comes with torch's CUDA builds alone: imported when it is needed.
        from tokenloom.worker.steps.ahead import compiled_ahead  # noqa: PLC0415

        return compiled_ahead(loaded, limits, self.device)

    def _held(self, configure: Configure) -> LoadedModel | None:
        """Returns the model asked for if it is in memory already."""
        held = self._loaded
        return held if held is not None and held.asked == ModelAsked.of(configure) else None


@dataclass(frozen=True, kw_only=True)
class _HostPending:
    done: StepDone

    def remaining_s(self) -> float:
        return 0.0

    def result(self) -> StepDone:
        return self.done


@dataclass(frozen=True, kw_only=True)
class _DevicePending:
    step: Step
    outcome: Outcome | None
    """On the host, once `end` is reached."""
    start: torch.cuda.Event
    end: torch.cuda.Event
    clock: StepClock

    def remaining_s(self) -> float:
        done: bool = self.end.query()  # type: ignore[no-untyped-call]
        return 0.0 if done else _POLL_S

    def result(self) -> StepDone:
        self.end.synchronize()
        return step_done(self.step, self.outcome, self.clock.add(self.start, self.end))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _limits(configure: Configure, loaded: LoadedModel, device: torch.device) -> Limits:
    """Returns what all ranks can hold: they warm up and capture the same steps."""
    num_blocks = loaded.decoder.ranks.smallest(loaded.pool.num_blocks)
    block_size = loaded.attention.block_size
    return Limits(
        num_slots=configure.max_num_requests,
        num_blocks=num_blocks,
        block_size=block_size,
        vocab_size=loaded.config.vocab_size,
        # A request that fills the whole pool may still sample one token more.
        max_model_tokens=min(
            max_model_tokens(configure, loaded.config), num_blocks * block_size + 1
        ),
        max_step_tokens=max_step_tokens(configure, device),
    )
