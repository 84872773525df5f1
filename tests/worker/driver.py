"""Drives anything that answers Steps the way a core would, in a few readable lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokenloom.wire.messages import Admit, Configure, Ready, SamplingParams, Step, StepDone


def int32(values: Sequence[int]) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


def ints(column: bytes) -> list[int]:
    return [int(value) for value in np.frombuffer(column, dtype="<i4")]


def sampling(
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    logit_bias: tuple[tuple[int, float], ...] = (),
    num_top_logprobs: int | None = None,
) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        logit_bias=logit_bias,
        num_top_logprobs=num_top_logprobs,
    )


def configuration(
    model: str = "",
    *,
    epoch: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
    rendezvous: str = "",
    dtype: str = "auto",
    quantize: str = "none",
    quantize_lm_head: bool = False,
    int8_threshold: float = 0.0,
    kv_cache: str = "auto",
    max_model_tokens: int | None = None,
    max_num_requests: int = 64,
    max_step_tokens: int | None = None,
) -> Configure:
    return Configure(
        epoch=epoch,
        rank=rank,
        world_size=num_ranks,
        rendezvous=rendezvous,
        model=model,
        dtype=dtype,
        quantize=quantize,
        quantize_lm_head=quantize_lm_head,
        int8_threshold=int8_threshold,
        kv_cache=kv_cache,
        max_model_tokens=max_model_tokens,
        max_num_requests=max_num_requests,
        max_step_tokens=max_step_tokens,
    )


@dataclass(kw_only=True)
class Slot:
    tokens: list[int]
    num_prompt: int
    num_computed: int
    blocks: list[int] = field(default_factory=list)

    @property
    def completion(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class Driver:
    """Keeps slots and blocks as a core does, with no regard for speed."""

    def __init__(self, step: Callable[[Step], StepDone], ready: Ready) -> None:
        self.ready = ready
        self.slots: dict[int, Slot] = {}
        self.free_blocks = list(range(ready.num_blocks))[::-1]
        self.last: StepDone | None = None
        self.num_steps = 0
        self._step = step
        self._released: list[int] = []
        self._admitted: list[Admit] = []
        self._new_blocks: list[tuple[int, int, int]] = []

    def add(
        self,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        slot: int | None = None,
        num_prompt: int | None = None,
        shared_blocks: Sequence[int] = (),
    ) -> int:
        """Admits a request; `shared_blocks` hold the start of its tokens already."""
        if slot is None:
            slot = next(i for i in range(len(self.slots) + 1) if i not in self.slots)
        num_prompt = len(tokens) if num_prompt is None else num_prompt
        num_computed = len(shared_blocks) * self.ready.block_size
        self.slots[slot] = Slot(
            tokens=list(tokens), num_prompt=num_prompt, num_computed=num_computed
        )
        self._admitted.append(
            Admit(
                slot=slot,
                tokens=int32(tokens),
                num_prompt_tokens=num_prompt,
                num_computed=num_computed,
                sampling=params or sampling(),
            )
        )
        for block in shared_blocks:
            self._append_block(slot, block)
        return slot

    def release(self, slot: int, *, keep_blocks: bool = False) -> Slot:
        """Drops a request; its blocks are free again unless they are kept (as cached)."""
        state = self.slots.pop(slot)
        self._released.append(slot)
        if not keep_blocks:
            self.free_blocks += state.blocks
        return state

    def step(self, spans: Mapping[int, int]) -> dict[int, int]:
        """Computes {slot: length} and returns {slot: sampled token}."""
        return self.finish(self._step(self.plan(spans)), spans)

    def plan(self, spans: Mapping[int, int]) -> Step:
        """Returns the Step that computes {slot: length}, with all changes since the last."""
        samples = []
        for slot, length in spans.items():
            state = self.slots[slot]
            end = state.num_computed + length
            while len(state.blocks) * self.ready.block_size < end:
                self._append_block(slot, self.free_blocks.pop())
            samples.append(end == len(state.tokens))
        self.num_steps += 1
        step = Step(
            epoch=self.ready.epoch,
            step_id=self.num_steps,
            released=int32(self._released),
            admitted=tuple(self._admitted),
            block_slots=int32([slot for slot, _, _ in self._new_blocks]),
            block_indices=int32([index for _, index, _ in self._new_blocks]),
            block_ids=int32([block for _, _, block in self._new_blocks]),
            span_slots=int32(list(spans)),
            span_starts=int32([self.slots[slot].num_computed for slot in spans]),
            span_lengths=int32(list(spans.values())),
            span_samples=bytes(samples),
        )
        self._released, self._admitted, self._new_blocks = [], [], []
        return step

    def finish(self, done: StepDone, spans: Mapping[int, int]) -> dict[int, int]:
        """Takes in what a step sampled."""
        self.last = done
        tokens = iter(ints(done.tokens))
        sampled = {}
        for slot, length in spans.items():
            state = self.slots[slot]
            state.num_computed += length
            if state.num_computed == len(state.tokens):
                sampled[slot] = next(tokens)
                state.tokens.append(sampled[slot])
        assert next(tokens, None) is None
        return sampled

    def run(self, num_tokens: Mapping[int, int], *, chunk: int | None = None) -> None:
        """Runs slots until each has so many completion tokens; prompts in pieces of `chunk`."""
        while True:
            spans = {}
            for slot, wanted in num_tokens.items():
                state = self.slots[slot]
                if len(state.completion) < wanted:
                    left = len(state.tokens) - state.num_computed
                    spans[slot] = min(left, chunk or left)
            if not spans:
                return
            self.step(spans)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chunk: int | None = None,
    ) -> list[list[int]]:
        """Returns the completions of prompts that run at once, and releases them."""
        wanted = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else num_tokens
        each = [params] * len(prompts) if not isinstance(params, Sequence) else params
        slots = [self.add(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        self.run(dict(zip(slots, wanted, strict=True)), chunk=chunk)
        return [self.release(slot).completion for slot in slots]

    def _append_block(self, slot: int, block: int) -> None:
        blocks = self.slots[slot].blocks
        self._new_blocks.append((slot, len(blocks), block))
        blocks.append(block)
