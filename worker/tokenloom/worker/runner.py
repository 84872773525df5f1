"""Model, KV pool, persistent batch and sampler as one Runner for the loop.

    launch(step)   check ─▶ put changes in place ─▶ forward ─▶ sample ─▶ append ─▶ copy back
                   host     └──────────────── device, nothing waits ───────────────────┘

On CUDA `launch` returns when the work is queued: a step may follow before the
one before it is done, and its tokens are read on the device. On a CPU the
result is there when `launch` returns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenloom.wire.messages import Admit, Configure, Ready, SamplingParams, Step, StepDone
from tokenloom.worker.batch import Batch
from tokenloom.worker.config import ModelConfig
from tokenloom.worker.errors import LoadError, ProtocolError
from tokenloom.worker.loading import LoadedModel, find_device, load_model
from tokenloom.worker.results import download_sampled, step_done
from tokenloom.worker.sampling import Sampled, Sampler
from tokenloom.worker.slots import Limits, Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tokenloom.worker.options import WorkerOptions

_POLL_S = 50e-6
"""How often the loop looks whether the device is done: short beside a step of milliseconds."""
_WARM_UP_TOKENS = 4096
"""Of the long request to warm up with: long enough for kernels to share its keys out."""


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """The state of the requests; a Configure starts it anew."""

    slots: Slots
    batch: Batch
    sampler: Sampler


class ModelRunner:
    """Computes steps with a real model."""

    def __init__(self, options: WorkerOptions) -> None:
        """Raises LoadError if the machine has no such device."""
        self._options = options
        self.device = find_device(options.device)
        self._loaded: LoadedModel | None = None
        self._epoch: _Epoch | None = None

    @torch.inference_mode()
    def configure(self, configure: Configure, report: Callable[[str, float], None]) -> Ready:
        """Loads the model unless it is loaded already, and starts from empty slots.

        Raises:
            LoadError: It cannot be served here.
        """
        if configure.world_size != 1:
            raise LoadError(f"world_size is {configure.world_size}; a worker serves alone")
        self._epoch = None
        if not self._holds(configure):
            self._loaded = None  # before the next model is loaded: both may not fit
            self._loaded = load_model(configure, self._options, self.device, report)
        loaded = self._loaded
        assert loaded is not None
        max_model_tokens = _max_model_tokens(configure, loaded.config)
        self._epoch = self._start_epoch(configure, loaded, max_model_tokens)
        if self.device.type == "cuda":
            report("warming up", 0.0)
            self._warm_up(configure.epoch)
            self._epoch = self._start_epoch(configure, loaded, max_model_tokens)
            report("warming up", 1.0)
        return Ready(
            epoch=configure.epoch,
            num_blocks=loaded.pool.num_blocks,
            block_size=loaded.attention.block_size,
            vocab_size=loaded.config.vocab_size,
            max_model_tokens=max_model_tokens,
            weights_bytes=loaded.weights_bytes,
            kv_bytes=loaded.pool.num_bytes,
        )

    @torch.inference_mode()
    def launch(self, step: Step) -> _HostPending | _DevicePending:
        """Starts a step. Raises ProtocolError if it contradicts those before it."""
        if self._epoch is None or self._loaded is None:
            raise ProtocolError(f"step {step.step_id} came before Configure")
        if self.device.type != "cuda":
            start_s = time.perf_counter()
            sampled = self._compute(step, self._epoch, self._loaded)
            seconds = time.perf_counter() - start_s
            return _HostPending(done=step_done(step, sampled, seconds))
        start, end = _event(), _event()
        start.record()
        sampled = self._compute(step, self._epoch, self._loaded)
        sampled = None if sampled is None else download_sampled(sampled)
        end.record()
        return _DevicePending(step=step, sampled=sampled, start=start, end=end)

    def _compute(self, step: Step, epoch: _Epoch, loaded: LoadedModel) -> Sampled | None:
        """Queues all of a step; None if nothing is sampled."""
        changes = epoch.slots.apply(step)
        epoch.sampler.admit(changes.admitted)
        fresh_blocks = epoch.batch.apply(changes)
        if fresh_blocks is not None:
            loaded.pool.clear(fresh_blocks)
        if not len(changes.span_slots):
            return None
        inputs = epoch.batch.inputs(changes)
        logits = loaded.decoder.forward(
            inputs.tokens,
            inputs.positions,
            inputs.last_tokens,
            spans=inputs.spans,
            pages=loaded.pool.pages,
            attention=loaded.attention,
        )
        if not len(inputs.rows.host_slots):
            return None
        sampled = epoch.sampler.sample(
            logits, inputs.rows, epoch.batch.tokens, epoch.slots.num_prompt_tokens
        )
        epoch.batch.append(inputs.rows, sampled.tokens)
        return sampled

    def _holds(self, configure: Configure) -> bool:
        """Returns whether the model asked for is in memory already."""
        loaded = self._loaded
        return loaded is not None and (loaded.model, loaded.dtype_name) == (
            configure.model,
            configure.dtype,
        )

    def _start_epoch(
        self, configure: Configure, loaded: LoadedModel, max_model_tokens: int
    ) -> _Epoch:
        block_size = loaded.attention.block_size
        limits = Limits(
            num_slots=configure.max_num_requests,
            num_blocks=loaded.pool.num_blocks,
            block_size=block_size,
            vocab_size=loaded.config.vocab_size,
            # A request that fills the whole pool may still sample one token more.
            max_model_tokens=min(max_model_tokens, loaded.pool.num_blocks * block_size + 1),
            max_step_tokens=configure.max_step_tokens,
        )
        device = self.device
        return _Epoch(
            slots=Slots(limits),
            batch=Batch(limits, device),
            sampler=Sampler(limits.num_slots, limits.vocab_size, device),
        )

    def _warm_up(self, epoch: int) -> None:
        """Runs steps of one short and one long request, so that none waits for kernels to compile.

        Kernels that share a request's keys out compile for long ones alone.
        """
        assert self._epoch is not None
        limits = self._epoch.slots.limits
        room = min(limits.max_model_tokens, limits.num_blocks * limits.block_size)
        longest = max(1, room - 2)  # two tokens are sampled behind the prompt, if there is room
        num_new = min(32, limits.max_step_tokens)
        step_id = 0
        for num_tokens in (min(num_new, longest), min(_WARM_UP_TOKENS, longest)):
            num_blocks = num_tokens // limits.block_size + 1
            num_computed = max(0, num_tokens - num_new)  # as if they lay in cached blocks
            admit = _warm_up_admit(num_tokens, num_computed)
            released = b"" if step_id == 0 else _int32([0])
            spans = [(num_computed, num_tokens - num_computed), (num_tokens, 1)]
            for start, length in spans[: room - num_tokens]:
                admitted = start == num_computed
                step = Step(
                    epoch=epoch,
                    step_id=step_id,
                    released=released if admitted else b"",
                    admitted=(admit,) if admitted else (),
                    block_slots=_int32([0] * num_blocks) if admitted else b"",
                    block_indices=_int32(range(num_blocks)) if admitted else b"",
                    block_ids=_int32(range(num_blocks)) if admitted else b"",
                    span_slots=_int32([0]),
                    span_starts=_int32([start]),
                    span_lengths=_int32([length]),
                    span_samples=b"\1",
                )
                self.launch(step).result()
                step_id += 1


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
    sampled: Sampled | None
    """On the host, once `end` is reached."""
    start: torch.cuda.Event
    end: torch.cuda.Event

    def remaining_s(self) -> float:
        done: bool = self.end.query()  # type: ignore[no-untyped-call]
        return 0.0 if done else _POLL_S

    def result(self) -> StepDone:
        self.end.synchronize()
        return step_done(self.step, self.sampled, self.start.elapsed_time(self.end) / 1000)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _max_model_tokens(configure: Configure, config: ModelConfig) -> int:
    wanted = configure.max_model_tokens
    if wanted is None:
        return config.max_model_tokens
    if wanted > config.max_model_tokens:
        raise LoadError(
            f"max_model_tokens is {wanted}; the checkpoint is made for {config.max_model_tokens}"
        )
    return wanted


def _warm_up_admit(num_tokens: int, num_computed: int) -> Admit:
    """Returns a request of zeros for slot 0."""
    sampling = SamplingParams(
        temperature=1.0,
        top_p=0.9,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=0,
        min_tokens=0,
        stop_token_ids=(),
        logit_bias=(),
        num_top_logprobs=None,
    )
    return Admit(
        slot=0,
        tokens=bytes(4 * num_tokens),
        num_prompt_tokens=num_tokens,
        num_computed=num_computed,
        sampling=sampling,
    )


def _int32(numbers: Iterable[int]) -> bytes:
    """Returns a column of a Step."""
    return np.fromiter(numbers, dtype="<i4").tobytes()
