"""Requests of all kinds, the same for whoever answers the steps."""

from __future__ import annotations

import numpy as np

from tests.worker.driver import Driver, sampling
from tests.worker.test_parity import random_prompt

NUM_SLOTS, MAX_STEP_TOKENS = 40, 400


class RandomLoad:
    """Requests that come, go, share blocks and are computed in chunks, as a seed has it."""

    def __init__(self, driver: Driver, seed: int, *, edits: bool) -> None:
        """With `edits`, some have penalties or ask for log probabilities."""
        self._rng = np.random.default_rng(seed)
        self._driver, self._edits = driver, edits
        self._free = list(range(NUM_SLOTS))
        self._wanted: dict[int, int] = {}
        self._num_added = 0
        self.completions: list[list[int]] = []
        self._prefix = random_prompt(2 * driver.ready.block_size)
        slot = self._driver.add(self._prefix)
        self._driver.run({slot: 1}, chunk=20)
        self._shared = self._driver.release(slot, keep_blocks=True).blocks

    def run(self, num_steps: int) -> list[list[int]]:
        """Runs steps with a few new requests each, with as many as fit, and with none.

        Returns the completions of those that ended.
        """
        for step in range(num_steps):
            few = int(self._rng.integers(4)) if step % 30 < 12 else 0
            num_new = NUM_SLOTS if step % 30 == 12 else few
            for _ in range(min(num_new, len(self._free))):
                self._add()
            if spans := self._spans():
                self._driver.step(spans)
            for slot, wanted in list(self._wanted.items()):
                if len(self._driver.slots[slot].completion) == wanted:
                    self._release(slot)
        return self.completions

    def _add(self) -> None:
        row = self._num_added
        self._num_added += 1
        params = sampling(
            temperature=row % 3 / 2,
            top_k=row % 4 * 10,
            seed=row,
            presence_penalty=0.7 if self._edits and row % 5 == 4 else 0,
            num_top_logprobs=2 if self._edits and row % 7 == 6 else None,
        )
        shared = self._shared if row % 3 == 2 else []
        prompt = random_prompt(int(self._rng.integers(1, 90)), row)
        if shared:
            prompt = self._prefix + prompt
        slot = self._driver.add(prompt, params, slot=self._free.pop(), shared_blocks=shared)
        self._wanted[slot] = int(self._rng.integers(1, 12))

    def _spans(self) -> dict[int, int]:
        """Returns {slot: length}, decodes first; chunks may wait, or end inside of a prompt."""
        states = {slot: self._driver.slots[slot] for slot in self._wanted}
        left = {slot: len(state.tokens) - state.num_computed for slot, state in states.items()}
        spans = {slot: 1 for slot in left if left[slot] == 1}
        room = MAX_STEP_TOKENS - len(spans)
        for slot in left.keys() - spans.keys():
            length = min(left[slot], room, int(self._rng.integers(50)))
            if length:
                spans[slot] = length
                room -= length
        return spans

    def _release(self, slot: int) -> None:
        state = self._driver.release(slot, keep_blocks=True)
        self._driver.free_blocks += [each for each in state.blocks if each not in self._shared]
        self.completions.append(state.completion)
        self._free.append(slot)
        del self._wanted[slot]
