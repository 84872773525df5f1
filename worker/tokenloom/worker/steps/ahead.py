"""Triton and CUDA kernels compiled in threads, before steps launch them.

    steps of every shape, ─▶ launches, recorded: ─▶ compiled, a thread each; beside it
    on the meta device       kernel, signature      flash-attn-4 is imported

What a step launches depends on shapes alone. So the steps' own code says what there is to
compile: with tensors that have no content nothing is computed, and a Triton driver without a
device launches nothing.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tokenloom.worker.kernels.cuda import CudaKernel, load, recorded_kernels
from tokenloom.worker.steps.computing import Rows, compute
from tokenloom.worker.steps.shapes import FixedSteps
from tokenloom.worker.steps.slots import Slots
from tokenloom.worker.steps.warmup import warm_up_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton.runtime.jit import JITFunction, JitFunctionInfo

    from tokenloom.worker.loading import LoadedModel
    from tokenloom.worker.steps.slots import Limits


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """A kernel, and for what it is to be compiled."""

    kernel: JITFunction
    specialization: str
    """As Triton's `preload` takes it"""


@contextmanager
def compiled_ahead(loaded: LoadedModel, limits: Limits, device: torch.device) -> Iterator[None]:
    """Compiles beside what runs within it all that a model's steps will launch on a CUDA device.

    What Triton has on disk is loaded from there. Errors of the compiler are raised at the end.
    """
    capability = torch.cuda.get_device_capability(device)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    start_s = time.perf_counter()
    with recorded_launches(target) as launches, recorded_kernels() as kernels:
        launch_all(loaded.outline(), limits)
    found_s = time.perf_counter()
    with ThreadPoolExecutor(
        os.cpu_count(), "compiling", initializer=torch.cuda.set_device, initargs=(device,)
    ) as threads:
        compiling = [threads.submit(_compile, launch) for launch in launches]
        compiling += [threads.submit(_load, kernel, device) for kernel in kernels]
        yield
        _log.info(
            "%d Triton and %d CUDA kernels: found in %.2f s, there after %.2f s",
            len(launches),
            len(kernels),
            found_s - start_s,
            max((each.result() for each in compiling), default=start_s) - start_s,
        )


def launch_all(outline: LoadedModel, limits: Limits) -> None:
    """Runs, on the meta device, steps of every shape that is compiled for by itself."""
    rows = Rows.empty(limits, outline.decoder, torch.device("meta"))
    slots = Slots(limits)
    for step in warm_up_steps(0, limits):
        compute(slots.apply(step), outline, rows, slots)
    steps = FixedSteps(outline, rows.batch, rows.sampler, limits)
    for shape in steps.shapes:
        steps.rehearse(shape)


@contextmanager
def recorded_launches(target: GPUTarget) -> Iterator[dict[Launch, None]]:
    """Within it kernels are not launched; yields what would have been, each once, in order."""
    launches: dict[Launch, None] = {}

    # Triton calls it by these names.
    def record(*, fn: JitFunctionInfo, compile: dict[str, Any], **_: object) -> bool:  # noqa: A002
        launches[Launch(fn.jit_function, compile["specialization_data"])] = None
        return True  # leave it uncompiled

    active, hook = driver.active, knobs.runtime.jit_cache_hook
    driver.set_active(_NoDevice(target))
    knobs.runtime.jit_cache_hook = record
    try:
        yield launches
    finally:
        driver.set_active(active)
        knobs.runtime.jit_cache_hook = hook


class _NoDevice:
    """A Triton driver whose device has no compiled kernel, ever: each is to be compiled first."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return "none"

    def get_current_stream(self, _device: str) -> int:
        return 0


def _compile(launch: Launch) -> float:
    """Returns when it was done, in seconds."""
    compiled = launch.kernel.preload(launch.specialization)
    compiled[1, 1, 1]  # on the device, with its launcher, which is compiled, too; not launched
    return time.perf_counter()


def _load(kernel: CudaKernel, device: torch.device) -> float:
    """Returns when it was done, in seconds."""
    load(kernel, device)
    return time.perf_counter()
