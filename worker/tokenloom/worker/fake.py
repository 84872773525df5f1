"""A worker without a model: the step protocol to the letter, tokens by arithmetic.

For tests and benchmarks of everything around a worker. It needs numpy, no torch.
`FakeModel` answers steps in process, with no clock: what a simulation drives.
`python -m tokenloom.worker.fake --connect ENDPOINT` is the process of it.

A token depends on all tokens before it, as with a real model. In place of keys
and values the pool keeps, for every position, a hash of all tokens up to there:

    terms   t0 = mix(token 0, 0)   t1 = mix(token 1, 1)   t2 = mix(token 2, 2)
    pool    [ t0 | t0 + t1 ] [ t0 + t1 + t2 | … ]          found by the block table
    token   mix(hash at the last position, seed, position) mod the vocabulary

So a wrong block, a stale cached one or two writers show: as a ProtocolError if
the rules below are broken, else as a token other than `expected_tokens` says.

* A slot takes a block either to read (all of it lies before `num_computed` of
  its admission) or to write. To write, it must be the only one that holds it.
* What a block taken to read holds is exactly what the slot's tokens hash to,
  by the time of the slot's first span; another span of the same step may write it.

Several processes of it are the ranks of a group (`fake_ranks.py`): each computes all, and they wait
for each other in each step.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn, TypeAlias, assert_never, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from tokenloom.wire.logs import add_log_options, set_up_logs
from tokenloom.wire.messages import Configure, Ready, SamplingParams, Step, StepDone, TokenLogprobs
from tokenloom.wire.started import process_start_s
from tokenloom.worker.errors import LoadError, ProtocolError, WorkerError
from tokenloom.worker.fake_ranks import FakeRanks
from tokenloom.worker.link import add_link_options, core_address
from tokenloom.worker.loop import EXIT_LOAD_FAILED, Recording, serve
from tokenloom.worker.phases import Phases
from tokenloom.worker.steps.slots import Changes, Int32Array, Limits, Slots

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class FakeConfig:
    """What the fake model pretends to be."""

    vocab_size: int = 512
    num_blocks: int = 1024
    block_size: int = 16
    max_model_tokens: int = 4096
    """Longest prompt + completion; Configure may ask for less."""
    max_step_tokens: int = 8192
    """Tokens that one step computes at most, if Configure leaves it open."""
    eos_token_id: int | None = None
    """Comes by script alone; None: no token is special."""
    eos_period: int = 64
    """A token is the eos one with a chance of 1 in this, decided by the hash."""
    faulty_token_id: int | None = None
    """A prompt that ends with this token gets a faulty row in place of its first token."""
    fatal_token_id: int | None = None
    """A prompt that ends with this token breaks the worker in the step that would draw its …"""
    fatal_index: int = 0
    """… completion token of this index."""


class FakeCrash(WorkerError):
    """A step has a request that is to break the worker."""


class FakeModel:
    """Answers steps as a worker would, and refuses those that break the protocol."""

    def __init__(self, config: FakeConfig | None = None) -> None:
        self.config = config or FakeConfig()
        self._state: _State | None = None

    def configure(self, configure: Configure) -> Ready:
        """Forgets everything and opens the epoch."""
        config = self.config
        max_model_tokens = min(
            config.max_model_tokens, configure.max_model_tokens or config.max_model_tokens
        )
        limits = Limits(
            num_slots=configure.max_num_requests,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            vocab_size=config.vocab_size,
            max_model_tokens=max_model_tokens,
            max_step_tokens=configure.max_step_tokens
            or max(config.max_step_tokens, configure.max_num_requests),
        )
        self._state = _State(config, limits, configure.epoch)
        return Ready(
            epoch=configure.epoch,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            vocab_size=config.vocab_size,
            max_model_tokens=max_model_tokens,
            max_step_tokens=limits.max_step_tokens,
            weights_bytes=0,
            kv_bytes=self._state.hashes.nbytes,
            fingerprint=repr(config),
        )

    def step(self, step: Step) -> StepDone:
        """Computes a step of the epoch that `configure` opened. Raises ProtocolError, FakeCrash."""
        if self._state is None:
            raise ProtocolError(f"step {step.step_id} came before Configure")
        return self._state.step(step)


class _State:
    """All that one epoch remembers."""

    def __init__(self, config: FakeConfig, limits: Limits, epoch: int) -> None:
        self.config = config
        self.limits = limits
        self.epoch = epoch
        self.slots = Slots(limits)
        num_slots = limits.num_slots
        self.tokens = np.zeros((num_slots, limits.max_model_tokens), dtype=np.int32)
        self.tables = np.zeros((num_slots, limits.max_slot_blocks), dtype=np.int32)
        self.seeds = np.zeros(num_slots, dtype=np.uint64)
        self.special = np.zeros(num_slots, dtype=np.bool_)  # [num_slots] needs a look by row
        self.sampling: dict[int, SamplingParams] = {}
        self.num_readable = np.zeros(num_slots, dtype=np.int32)  # [num_slots] computed at admission
        self.verified = np.zeros(num_slots, dtype=np.bool_)  # [num_slots] what was cached is right
        self.num_holders = np.zeros(limits.num_blocks, dtype=np.int32)
        # The hash of all tokens up to each position; a block is a row.
        self.hashes: UInt64Array = np.zeros((limits.num_blocks, limits.block_size), dtype=np.uint64)
        self.awaited = np.zeros((limits.num_blocks, limits.block_size), dtype=np.bool_)

    def step(self, step: Step) -> StepDone:
        if step.epoch != self.epoch:
            raise ProtocolError(f"step {step.step_id} of epoch {step.epoch}, not {self.epoch}")
        for slot in np.frombuffer(step.released, dtype="<i4") if step.released else ():
            self._release(int(slot))
        changes = self.slots.apply(step)
        for admitted in changes.admitted:
            slot = admitted.slot
            self.tokens[slot, : len(admitted.tokens)] = admitted.tokens
            self.seeds[slot] = admitted.sampling.seed & _MASK
            self.sampling[slot] = admitted.sampling
            self.special[slot] = _is_special(admitted.sampling, self.config)
            self.num_readable[slot] = admitted.num_computed
            self.verified[slot] = admitted.num_computed == 0
        self._hold_blocks(changes)
        self._compute(changes)
        return self._sample(changes)

    def _release(self, slot: int) -> None:
        if 0 <= slot < self.limits.num_slots:  # else Slots complains
            np.subtract.at(self.num_holders, self._table(slot), 1)

    def _table(self, slot: int) -> Int32Array:
        return self.tables[slot, : self.slots.num_blocks[slot]]

    def _hold_blocks(self, changes: Changes) -> None:
        slots, indices, ids = changes.block_slots, changes.block_indices, changes.block_ids
        if not len(slots):
            return
        self.tables[slots, indices] = ids
        # In the order of the message: a block must be taken to write before others read it.
        to_read = (indices + 1) * self.limits.block_size <= self.num_readable[slots]
        for slot, block, reads in zip(slots.tolist(), ids.tolist(), to_read.tolist(), strict=True):
            if not reads and self.num_holders[block]:
                raise ProtocolError(
                    f"slot {slot} takes block {block} to write while"
                    f" {self.num_holders[block]} slots hold it"
                )
            self.num_holders[block] += 1

    def _compute(self, changes: Changes) -> None:
        """Writes the hashes of all spans, those first that others of this step read."""
        slots, starts, lengths = changes.span_slots, changes.span_starts, changes.span_lengths
        if not len(slots):
            return
        rows = np.repeat(np.arange(len(slots)), lengths)  # [num_tokens] span of each token
        first = np.cumsum(lengths) - lengths  # [num_spans] where the span begins in the step
        positions = np.arange(len(rows)) - first[rows] + starts[rows]  # [num_tokens]
        blocks = self.tables[slots[rows], positions // self.limits.block_size]
        offsets = positions % self.limits.block_size
        terms = _mix(
            self.tokens[slots[rows], positions].astype(np.uint64)
            | (positions.astype(np.uint64) << np.uint64(32))
        )
        sums = np.cumsum(terms, dtype=np.uint64)
        sums -= (sums[first] - terms[first])[rows]  # [num_tokens] from the span's first token on
        fresh = ~self.verified[slots]
        if not fresh.any():
            self.hashes[blocks, offsets] = sums + self._bases(slots, starts)[rows]
            return
        self.awaited[blocks, offsets] = True
        left = np.ones(len(slots), dtype=np.bool_)
        while left.any():
            ready = left & ~self._reads_awaited(slots, starts, fresh)
            if not ready.any():
                raise ProtocolError(f"slots {slots[left].tolist()} wait for each other's blocks")
            for slot in slots[ready & fresh].tolist():
                self._verify(slot)
            now = ready[rows]
            bases = self._bases(slots, starts)[rows]
            self.hashes[blocks[now], offsets[now]] = sums[now] + bases[now]
            self.awaited[blocks[now], offsets[now]] = False
            left &= ~ready

    def _bases(self, slots: Int32Array, starts: Int32Array) -> UInt64Array:
        """Returns the hash before each span, as the pool has it."""
        before = np.maximum(starts - 1, 0)
        blocks = self.tables[slots, before // self.limits.block_size]
        bases = self.hashes[blocks, before % self.limits.block_size]
        return np.where(starts > 0, bases, np.uint64(0))

    def _reads_awaited(
        self, slots: Int32Array, starts: Int32Array, fresh: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Returns which spans read what another span of this step has yet to write."""
        before = np.maximum(starts - 1, 0)
        blocks = self.tables[slots, before // self.limits.block_size]
        awaits: npt.NDArray[np.bool_] = self.awaited[blocks, before % self.limits.block_size]
        awaits = awaits & (starts > 0)
        for row in np.flatnonzero(fresh).tolist():
            blocks, offsets = self._places(int(slots[row]), int(starts[row]))
            awaits[row] = bool(self.awaited[blocks, offsets].any())
        return np.asarray(awaits)

    def _places(self, slot: int, end: int) -> tuple[Int32Array, Int64Array]:
        """Returns blocks and offsets of a slot's positions below `end`."""
        positions = np.arange(end)
        return self.tables[slot, positions // self.limits.block_size], (
            positions % self.limits.block_size
        )

    def _verify(self, slot: int) -> None:
        """Checks that the cached positions of a slot hold what its tokens hash to."""
        end = int(self.num_readable[slot])
        blocks, offsets = self._places(slot, end)
        right = _prefix_hashes(self.tokens[slot, :end])
        wrong = np.flatnonzero(self.hashes[blocks, offsets] != right)
        if len(wrong):
            raise ProtocolError(
                f"slot {slot} is admitted with {end} tokens computed, but block"
                f" {blocks[wrong[0]]} holds something else at position {wrong[0]}"
            )
        self.verified[slot] = True

    def _sample(self, changes: Changes) -> StepDone:
        slots = changes.span_slots[changes.span_samples]
        ends = (changes.span_starts + changes.span_lengths)[changes.span_samples]
        if len(slots):
            tokens = _next_tokens(
                self._bases(slots, ends), self.seeds[slots], ends.astype(np.uint64), self.config
            )
        else:
            tokens = np.zeros(0, dtype=np.int32)
        faulty: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for row in np.flatnonzero(self.special[slots]).tolist():
            slot, end = int(slots[row]), int(ends[row])
            params = self.sampling[slot]
            num_prompt = int(self.slots.num_prompt_tokens[slot])
            if (
                end == num_prompt + self.config.fatal_index
                and self.tokens[slot, num_prompt - 1] == self.config.fatal_token_id
            ):
                raise FakeCrash(f"the request in slot {slot} is fatal")
            if end == num_prompt and self.tokens[slot, end - 1] == self.config.faulty_token_id:
                tokens[row] = 0
                faulty.append(row)
                continue
            tokens[row] = _without_stops(
                int(tokens[row]),
                end - num_prompt,
                params.min_tokens,
                params.stop_token_ids,
                self.config,
            )
            if params.num_top_logprobs is not None:
                logprobs.append(_logprobs(row, int(tokens[row]), params, self.config))
        self.tokens[slots, ends] = tokens
        return StepDone(
            epoch=changes.epoch,
            step_id=changes.step_id,
            tokens=tokens.astype("<i4").tobytes(),
            logprobs=tuple(logprobs),
            faulty_rows=np.array(faulty, dtype="<i4").tobytes(),
            compute_s=0.0,
        )


def expected_tokens(
    prompt: Sequence[int],
    num_tokens: int,
    *,
    seed: int,
    config: FakeConfig | None = None,
    min_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
) -> list[int]:
    """Returns the completion that an undisturbed run gives, `num_tokens` of it.

    It goes on past eos and stop tokens: where a request ends is not the model's affair.
    """
    config = config or FakeConfig()
    chain = 0
    for position, token in enumerate(prompt):
        chain += _mix_one(token | position << 32)
    completion: list[int] = []
    seed_term = _mix_one(seed & _MASK)
    for position in range(len(prompt), len(prompt) + num_tokens):
        value = _mix_one((chain & _MASK) ^ seed_term ^ position)
        token = value % config.vocab_size
        if config.eos_token_id is not None:
            if (value >> 32) % config.eos_period == 0:
                token = config.eos_token_id
            elif token == config.eos_token_id:
                token = (token + 1) % config.vocab_size
        token = _without_stops(token, len(completion), min_tokens, stop_token_ids, config)
        completion.append(token)
        chain += _mix_one(token | position << 32)
    return completion


def _next_tokens(
    chains: UInt64Array, seeds: UInt64Array, positions: UInt64Array, config: FakeConfig
) -> Int32Array:
    values = _mix(chains ^ _mix(seeds) ^ positions)
    tokens = (values % np.uint64(config.vocab_size)).astype(np.int32)
    if config.eos_token_id is not None:
        tokens[tokens == config.eos_token_id] = (config.eos_token_id + 1) % config.vocab_size
        ends = (values >> np.uint64(32)) % np.uint64(config.eos_period) == 0
        tokens[ends] = config.eos_token_id
    return tokens


def _prefix_hashes(tokens: Int32Array) -> UInt64Array:
    positions = np.arange(len(tokens), dtype=np.uint64)
    return np.cumsum(_mix(tokens.astype(np.uint64) | (positions << np.uint64(32))), dtype=np.uint64)


def _is_special(params: SamplingParams, config: FakeConfig) -> bool:
    return (
        params.num_top_logprobs is not None
        or (params.min_tokens > 0 and bool(params.stop_token_ids))
        or config.faulty_token_id is not None
        or config.fatal_token_id is not None
    )


def _without_stops(
    token: int,
    num_completion: int,
    min_tokens: int,
    stop_token_ids: Sequence[int],
    config: FakeConfig,
) -> int:
    """Returns the next token that may be drawn while the completion is too short to stop."""
    if num_completion < min_tokens:
        for _ in range(len(stop_token_ids)):
            if token not in stop_token_ids:
                break
            token = (token + 1) % config.vocab_size
    return token


def _logprobs(row: int, token: int, params: SamplingParams, config: FakeConfig) -> TokenLogprobs:
    """Returns made-up numbers: the drawn token is the likeliest, its successors follow."""
    num_top = params.num_top_logprobs or 0
    ranks = np.arange(num_top)
    return TokenLogprobs(
        row=row,
        logprob=-0.5,
        top_ids=((token + ranks) % config.vocab_size).astype("<i4").tobytes(),
        top_logprobs=(-0.5 - ranks).astype("<f4").tobytes(),
    )


def _mix(values: UInt64Array) -> UInt64Array:
    """Returns splitmix64 of each value (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_one(value: int) -> int:
    """Returns what `_mix` does, for one Python integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


CrashKind: TypeAlias = Literal["kill", "raise", "hang"]


@dataclass(frozen=True, kw_only=True)
class FakeOptions:
    """What a fake process does beside computing."""

    step_s: float = 0.0
    load_s: float = 0.0
    """How long it pretends to load."""
    crash: CrashKind = "kill"
    """What a fatal request does to it."""
    crash_rank: int = 0
    """The rank to which it does that."""


@dataclass(frozen=True, kw_only=True)
class _FakePending:
    done: StepDone
    due_s: float
    ranks: FakeRanks

    def remaining_s(self) -> float:
        return self.due_s - time.monotonic()

    def result(self) -> StepDone:
        time.sleep(max(0.0, self.remaining_s()))
        self.ranks.wait_for_each_other()
        return self.done


class _FakeRunner:
    """Gives each step its time; steps in flight follow each other without a gap."""

    def __init__(self, config: FakeConfig, options: FakeOptions, ranks: FakeRanks) -> None:
        self._model = FakeModel(config)
        self._options = options
        self._ranks = ranks
        self._rank = 0
        self._busy_until_s = 0.0
        self._num_to_record = 0
        self._recorded: list[dict[str, object]] = []

    def record(self, num_steps: int) -> None:
        """Notes when steps begin, in place of a profiler."""
        self._num_to_record = num_steps
        self._recorded = []

    def take(self) -> Recording | None:
        """Returns the notes once there are enough."""
        if not self._recorded or self._num_to_record:
            return None
        events, self._recorded = self._recorded, []
        return Recording(data=gzip.compress(msgspec.json.encode({"traceEvents": events})))

    def configure(self, configure: Configure, report: Callable[[str, float], None]) -> Ready:
        report("pretending to load", 0.0)
        time.sleep(self._options.load_s)
        self._rank = configure.rank
        self._ranks.meet(
            rank=configure.rank,
            world_size=configure.world_size,
            rendezvous=configure.rendezvous,
        )
        report("pretending to load", 1.0)
        return self._model.configure(configure)

    def launch(self, step: Step) -> _FakePending:
        step_s = self._options.step_s
        self._busy_until_s = max(self._busy_until_s, time.monotonic()) + step_s
        if self._num_to_record:
            self._note(step)
        try:
            done = msgspec.structs.replace(self._model.step(step), compute_s=step_s)
        except FakeCrash:
            if self._rank == self._options.crash_rank:
                _crash(self._options.crash)
            done = _nothing(step)  # it will wait in vain for the rank that crashed
        return _FakePending(done=done, due_s=self._busy_until_s, ranks=self._ranks)

    def _note(self, step: Step) -> None:
        step_us = 1e6 * self._options.step_s
        self._recorded.append(
            {
                "name": f"step {step.step_id}",
                "ph": "X",
                "ts": 1e6 * self._busy_until_s - step_us,
                "dur": step_us,
                "pid": os.getpid(),
                "tid": self._rank,
            }
        )
        self._num_to_record -= 1


def _nothing(step: Step) -> StepDone:
    return StepDone(
        epoch=step.epoch,
        step_id=step.step_id,
        tokens=b"",
        logprobs=(),
        faulty_rows=b"",
        compute_s=0.0,
    )


def _crash(kind: CrashKind) -> NoReturn:
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError("the device is lost")
        case "hang":
            pass
        case _:
            assert_never(kind)
    while True:
        signal.pause()


def main(argv: list[str] | None = None) -> int:
    """Runs the fake worker's process; returns its exit code."""
    args = _parser().parse_args(argv)
    phases = Phases("imports", process_start_s())
    set_up_logs("worker", form=args.log_format, level=args.log_level)
    config = FakeConfig(**{name: getattr(args, name) for name, _ in _CONFIG_OPTIONS})
    options = FakeOptions(
        step_s=args.step_ms / 1000,
        load_s=args.load_s,
        crash=args.crash,
        crash_rank=args.crash_rank,
    )
    try:
        core = core_address(args)
    except LoadError as error:
        _log.error("%s", error)
        return EXIT_LOAD_FAILED
    ranks = FakeRanks()
    runner = _FakeRunner(config, options, ranks)
    return serve(
        runner,
        recorder=runner,
        core=core,
        device="fake",
        address=ranks.address,
        phases=phases,
    )


_CONFIG_OPTIONS = (
    ("vocab_size", "ids that the model knows"),
    ("num_blocks", "blocks of the pool"),
    ("block_size", "positions of a block"),
    ("max_model_tokens", "longest prompt + completion"),
    ("eos_token_id", "token that comes by script alone"),
    ("eos_period", "one in so many tokens is that one"),
    ("faulty_token_id", "prompts that end with it are faulty"),
    ("fatal_token_id", "prompts that end with it break the worker"),
    ("fatal_index", "completion token that they break it at"),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenloom.worker.fake",
        description="A worker without a model, for tests and benchmarks of what is around it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_link_options(parser)
    add_log_options(parser)
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of a step")
    parser.add_argument("--load-s", type=float, default=0.0, help="time of loading")
    parser.add_argument(
        "--crash", choices=get_args(CrashKind), default="kill", help="what a fatal prompt does"
    )
    parser.add_argument("--crash-rank", type=int, default=0, help="the rank that it does it to")
    defaults = FakeConfig()
    for name, text in _CONFIG_OPTIONS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(defaults, name), help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
