"""`apply`: what a finished step means for the requests that were in it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokenloom.scheduler.core import accounting, crashes
from tokenloom.scheduler.core.blocks import BlockPool, Int32Array
from tokenloom.scheduler.core.state import Int64Array, Slots, State, StepRecord
from tokenloom.scheduler.messages import FinishReason
from tokenloom.wire.messages import StepDone, TokenLogprobs


class ResultError(ValueError):
    """A result does not answer the oldest step in flight."""


def apply(state: State, result: StepDone, now: float) -> None:
    """Enters a step's result: tokens, stops, cached blocks; outputs are collected by front.

    Raises ResultError, and changes nothing, if the result does not fit the step.
    """
    slots, pool = state.slots, state.pool
    if slots is None or pool is None or not state.in_flight:
        raise ResultError(f"step {result.step_id} is done, but none is in flight")
    record = state.in_flight[0]
    tokens = _check(result, record, slots)
    state.in_flight.popleft()
    pool.now_s = now
    state.totals.end_step(num_requests=len(record.slots), now=now)
    _note_step(state, record, result.compute_s, now)

    # A request that ended or was preempted since has left its slot: its rows are dropped.
    alive = slots.tenure[record.slots] == record.tenures
    computed = record.slots[alive]
    slots.num_computed[computed] = record.ends[alive]
    slots.gpu_s[computed] += _shares(state, record, alive, result.compute_s)

    rows = np.flatnonzero(alive[record.sampled])
    faulty = np.frombuffer(result.faulty_rows, np.int32)
    if len(faulty):
        broken = record.slots[record.sampled[np.intersect1d(rows, faulty)]]
        for slot in broken.tolist():
            _finish(state, slots, slot, FinishReason.FAULT)
        rows = np.setdiff1d(rows, faulty)
        computed = computed[slots.serial[computed] != 0]

    sampled = record.slots[record.sampled[rows]]
    drawn = tokens[rows]
    positions = slots.num_tokens[sampled]
    slots.tokens[sampled, positions] = drawn
    slots.num_tokens[sampled] = positions + 1
    state.totals.note_tokens(slots.last_token_s[sampled], now)
    slots.last_token_s[sampled] = now
    first = sampled[np.isnan(slots.first_token_s[sampled])]
    slots.first_token_s[first] = now

    _cache_full_blocks(slots, pool, computed)
    _collect(state, slots, sampled, drawn, rows, result.logprobs)

    stopped = (slots.stop_ids[sampled] == drawn[:, None]).any(axis=1)
    ended = stopped | (positions + 1 >= slots.max_total[sampled])
    for row in np.flatnonzero(ended).tolist():
        if stopped[row]:
            _finish(state, slots, int(sampled[row]), FinishReason.STOP_TOKEN, int(drawn[row]))
        else:
            _finish(state, slots, int(sampled[row]), FinishReason.LENGTH)
    crashes.judge(state)


def _check(result: StepDone, record: StepRecord, slots: Slots) -> Int32Array:
    """Returns the tokens of a result that fits its step."""
    if result.step_id != record.step_id:
        raise ResultError(f"step {result.step_id} is done; step {record.step_id} is the oldest")
    num_sampled = len(record.sampled)
    if len(result.tokens) != 4 * num_sampled or len(result.faulty_rows) % 4:
        raise ResultError(
            f"step {result.step_id} samples {num_sampled} tokens; "
            f"its result has {len(result.tokens)} bytes of them"
        )
    tokens = np.frombuffer(result.tokens, np.int32)
    if num_sampled and not 0 <= tokens.min() <= tokens.max() < slots.vocab_size:
        raise ResultError(
            f"step {result.step_id} drew ids {tokens.min()} to {tokens.max()}; "
            f"the model knows 0 to {slots.vocab_size - 1}"
        )
    faulty = np.frombuffer(result.faulty_rows, np.int32)
    for row in faulty.tolist() + [logprobs.row for logprobs in result.logprobs]:
        if not 0 <= row < num_sampled:
            raise ResultError(f"row {row} is named; step {result.step_id} has {num_sampled} rows")
    return tokens


def _shares(
    state: State, record: StepRecord, alive: npt.NDArray[np.bool_], compute_s: float
) -> accounting.Float64Array | float:
    """Returns what each of those that are left owes for a step, in seconds of one GPU."""
    gpu_s = accounting.gpu_seconds(compute_s, 1 if state.spec is None else state.spec.num_ranks)
    state.totals.gpu_s += gpu_s
    if not record.num_prompt_tokens:
        return gpu_s / len(record.slots)
    shares = accounting.shares(
        gpu_s,
        lengths=record.lengths,
        num_decoding=record.num_decoding,
        decode_weight=state.costs.decode_weight(record.num_decoding),
    )
    return shares[alive]


def _note_step(state: State, record: StepRecord, compute_s: float, now: float) -> None:
    """Learns from a step: what it cost the device, and how long it kept others waiting."""
    state.costs.note(
        num_prompt_tokens=record.num_prompt_tokens,
        num_decoding=record.num_decoding,
        compute_s=compute_s,
    )
    began_s = max(record.planned_s, state.last_result_s)
    state.last_result_s = now
    state.forecast.note_step(
        num_decoding=record.num_decoding,
        prompts_s=record.num_prompt_tokens * (state.costs.prompt_token_s or 0.0),
        step_s=now - began_s,
    )


def _finish(
    state: State, slots: Slots, slot: int, reason: FinishReason, stop_token_id: int | None = None
) -> None:
    request = slots.requests[slot]
    assert request is not None
    state.finish(request, reason, stop_token_id=stop_token_id)


def _cache_full_blocks(slots: Slots, pool: BlockPool, computed: Int64Array) -> None:
    """Makes blocks findable that this step filled."""
    if not pool.caches:
        return
    num_full = slots.num_computed[computed] // pool.block_size
    num_hashed = slots.num_hashed[computed]
    changed = np.flatnonzero(num_full > num_hashed)
    if not len(changed):
        return
    rows = computed[changed]
    slots.num_hashed[rows] = num_full[changed]
    for slot, begin, end in zip(
        rows.tolist(), num_hashed[changed].tolist(), num_full[changed].tolist(), strict=True
    ):
        request = slots.requests[slot]
        assert request is not None
        request.extend_digests(slots.tokens[slot], end, pool.block_size)
        blocks = slots.block_table[slot, begin:end].tolist()
        for block, digest in zip(blocks, request.digests[begin + 1 : end + 1], strict=True):
            pool.register(block, digest)


def _collect(
    state: State,
    slots: Slots,
    sampled: Int64Array,
    drawn: Int32Array,
    rows: npt.NDArray[np.intp],
    logprobs: tuple[TokenLogprobs, ...],
) -> None:
    """Hands each front its streams' tokens and log probabilities."""
    if not len(sampled):
        return
    fronts, streams = slots.front[sampled], slots.stream[sampled]
    by_row = {entry.row: entry for entry in logprobs}
    for front in np.unique(fronts).tolist():
        mine = np.flatnonzero(fronts == front)
        outputs = state.outputs_of(front)
        if by_row:
            for index, row in enumerate(rows[mine].tolist()):
                if (entry := by_row.get(row)) is not None:
                    outputs.logprobs.append(
                        TokenLogprobs(
                            row=outputs.num_tokens + index,
                            logprob=entry.logprob,
                            top_ids=entry.top_ids,
                            top_logprobs=entry.top_logprobs,
                        )
                    )
        outputs.streams.append(streams[mine])
        outputs.tokens.append(drawn[mine])
        outputs.num_tokens += len(mine)
