"""The step protocol: what the core and each rank of a group say to each other.

    worker                         core
      │ ── Hello ───────────────────▶ │   who I am
      │ ◀─────────────── Configure ── │   once all have come: your rank, what to load
      │ ── Progress … ──────────────▶ │   how far the loading is
      │ ── Ready ───────────────────▶ │   what I can hold
      │ ◀──────────────────── Step ── │   the same to all ranks; two may be in flight
      │ ── StepDone ────────────────▶ │   from rank 0 alone, in the order of the steps
      │ ◀───────────────── Profile ── │   now and then: record the next steps
      │ ── Trace … ─────────────────▶ │   what was recorded, in pieces, from each rank
      │ ◀──────────────── Shutdown ── │

A message is a msgspec struct, array-like and tagged, so a frame is a compact
MessagePack array whose first element names the type. Columns (`bytes` fields)
are little-endian packed arrays; their element type stands beside the field.
Every step bears (epoch, step_id): a frame of another epoch is dropped.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

PROTOCOL_VERSION = 8

MAX_NUM_REQUESTS = 8192
"""Slots that a worker can have: its kernels are compiled for steps of up to so many spans."""


class _Message(
    msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True, forbid_unknown_fields=True
):
    """Base of all wire messages. Each repeats `frozen`, which type checkers do not inherit."""


class Hello(_Message, frozen=True):
    """First frame of a worker process."""

    protocol_version: int
    pid: int
    device: str
    address: str
    """`HOST:PORT` where it listens for other ranks; empty: it can be the only one."""


class Configure(_Message, frozen=True):
    """What the worker loads and how large its state is; opens an epoch."""

    epoch: int
    rank: int
    world_size: int
    rendezvous: str
    """`HOST:PORT` of rank 0's store, where all ranks of the epoch meet; empty: it is alone."""
    model: str
    """A local folder or a Hub id."""
    dtype: str
    """`bfloat16`, `float16`, `float32`, or `auto` for the checkpoint's own."""
    quantize: str
    """`nf4`, `fp4` or `int8` for matrices that are stored dense; `none` leaves them."""
    quantize_lm_head: bool
    """Whether the head is quantized with them, or as those of the checkpoint are."""
    int8_threshold: float
    """Inputs of 8-bit matrices where an activation reaches it are not quantized; 0: all are."""
    kv_cache: str
    """`fp8` for keys and values in 8 bits, or `auto` for the type of the arithmetic."""
    max_model_tokens: int | None
    """Longest prompt + completion; None: what the checkpoint's config allows."""
    max_num_requests: int
    """Slots of the persistent batch, at most MAX_NUM_REQUESTS."""
    max_step_tokens: int | None
    """The most tokens that one step computes; None: what suits the device."""


class Progress(_Message, frozen=True):
    """A phase of loading advanced. `fraction` is in [0, 1]."""

    epoch: int
    phase: str
    fraction: float


class Ready(_Message, frozen=True):
    """The model is loaded and the KV pool allocated; steps may come."""

    epoch: int
    num_blocks: int
    block_size: int
    """KV positions in a block; the attention backend's choice."""
    vocab_size: int
    """Width of the logits: valid token ids lie below it."""
    max_model_tokens: int
    max_step_tokens: int
    """At least as many as there are slots."""
    weights_bytes: int
    kv_bytes: int
    phases: tuple[tuple[str, float], ...] = ()
    """What it took to get here, in seconds, from the start of the process in a first epoch."""
    fingerprint: str = ""
    """Names the weights and how they are computed with; the same on all ranks."""


class Failed(_Message, frozen=True):
    """The worker cannot go on, and so its group: it cannot load, or a step broke it."""

    epoch: int
    error: str
    """For the operator's log; never shown to a client."""


class SamplingParams(_Message, frozen=True):
    """How a slot's tokens are drawn; values are validated before they come here."""

    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    """0 keeps all."""
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    """Unsigned 64 bits. The draw of a token depends on (seed, position) alone."""
    min_tokens: int
    """Before this many completion tokens `stop_token_ids` cannot be drawn."""
    stop_token_ids: tuple[int, ...]
    logit_bias: tuple[tuple[int, float], ...]
    num_top_logprobs: int | None
    """None: no logprobs at all; 0: of the drawn token alone."""


class Admit(_Message, frozen=True):
    """A request enters a slot.

    `tokens` holds everything known of it: the prompt and, after a preemption,
    the completion so far. Positions before `num_computed` lie in cached blocks.
    """

    slot: int
    tokens: bytes
    """int32 [num_tokens]"""
    num_prompt_tokens: int
    num_computed: int
    sampling: SamplingParams


class Step(_Message, frozen=True):
    """One forward pass, told as changes since the step before.

    Applied in the order of the fields: slots are released, requests admitted,
    blocks appended to block tables, then the spans are computed. The worker
    appends each sampled token to its slot's tokens, so that a following
    Step can compute it before anybody else knows it.

        slot 3:   tokens   t0 t1 … t36 | t37 (sampled by the step before)
                  span     start=37, length=1, sampled=1 → appends t38
    """

    epoch: int
    step_id: int
    released: bytes
    """int32 [num_released] slots whose request left"""
    admitted: tuple[Admit, ...]
    block_slots: bytes
    """int32 [num_new_blocks] slot that gets the block"""
    block_indices: bytes
    """int32 [num_new_blocks] index in the slot's block table"""
    block_ids: bytes
    """int32 [num_new_blocks] block of the KV pool"""
    span_slots: bytes
    """int32 [num_spans], each slot at most once"""
    span_starts: bytes
    """int32 [num_spans] position of the span's first token"""
    span_lengths: bytes
    """int32 [num_spans], at least 1"""
    span_samples: bytes
    """uint8 [num_spans] 1: the span reaches the slot's last token, sample the next"""


class TokenLogprobs(_Message, frozen=True):
    """Log probabilities at one sampled token."""

    row: int
    """Index among the step's sampled spans."""
    logprob: float
    top_ids: bytes
    """int32 [num_top] likeliest first"""
    top_logprobs: bytes
    """float32 [num_top]"""


class StepDone(_Message, frozen=True):
    """What a step sampled."""

    epoch: int
    step_id: int
    tokens: bytes
    """int32 [num_sampled], in the order of the spans that sample"""
    logprobs: tuple[TokenLogprobs, ...]
    """Only rows whose request asked."""
    faulty_rows: bytes
    """int32 rows whose logits were not finite: the request fails, the others go on"""
    compute_s: float
    """Seconds that the step took on the device."""


class Profile(_Message, frozen=True):
    """The worker records the steps that it launches from now on."""

    epoch: int
    number: int
    """Names the recording."""
    num_steps: int
    """0: what is being recorded is forgotten."""


class Trace(_Message, frozen=True):
    """The next piece of a recording: a gzip file in Chrome's trace event format."""

    epoch: int
    number: int
    """Profile's."""
    data: bytes
    is_last: bool
    error: str = ""
    """Why there is none; then the piece is empty and the last."""


class Shutdown(_Message, frozen=True):
    """The worker finishes what is in flight and exits with 0."""


ToWorker: TypeAlias = Configure | Step | Profile | Shutdown
ToCore: TypeAlias = Hello | Progress | Ready | Failed | StepDone | Trace
