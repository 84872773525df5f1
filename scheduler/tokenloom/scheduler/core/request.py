"""A request, as the core knows it from submission to finish."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenloom.scheduler.core.blocks import BlockPool, Int32Array, block_digest
from tokenloom.scheduler.core.forecast import Estimate
from tokenloom.wire.messages import SamplingParams

REQUEST_BYTES = 2048
BIAS_BYTES = 128
STOP_ID_BYTES = 40
"""What a waiting request takes beside its tokens: its objects; a biased token; a stop token.

What CPython 3.11 allocates for them, rounded up."""


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One prompt and its completion, from submission to finish."""

    serial: int
    """Order of arrival; unique in the core's life."""
    front: int
    stream: int
    tenant: str
    priority: int
    """Among the requests of its tenant that have not run yet."""
    tokens: Int32Array
    """int32: all that is known while it waits; once it runs, its slot's row is the truth."""
    num_prompt: int
    max_total: int
    sampling: SamplingParams
    digests: list[bytes]
    """The root digest, then one for each full block known so far."""
    arrived_s: float
    request_id: str = ""
    """What operators name it by."""
    deadline_s: float = math.inf
    estimate: Estimate | None = None
    """What was foretold when it got its slot, as long as it keeps that."""
    num_prefilled: int = 0
    """Positions computed before the next token could be drawn, each time that it got a slot."""
    planned_s: float | None = None
    """When it first got a slot."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    slot: int | None = None
    num_crashes: int = 0
    """Crashes of a group with a step of it in flight, since it was last acquitted."""
    crash_tokens: int = 0
    """How many tokens it would have had after those steps."""
    gpu_s: float = 0.0
    """Its share of all its steps; while it runs, its slot's row is the truth."""
    kv_block_s: float = 0.0
    """Blocks times how long it held them; while it runs, less what their meters showed when it
    took them."""
    num_given: int = 0
    """Completion tokens that it came with."""
    num_found: int = 0
    """Positions that it found in the prefix cache when it got its slot."""
    num_computed: int = 0
    """The most positions that it ever had computed or found when it lost its slot."""
    num_recomputed: int = 0
    num_preemptions: int = 0

    def leave_slot(self, num_computed: int) -> int:
        """Enters how far it was computed in its slot; returns how much of it not the first time."""
        num_again = max(0, min(num_computed, self.num_computed) - self.num_found)
        self.num_recomputed += num_again
        self.num_computed = max(self.num_computed, num_computed)
        return num_again

    @property
    def num_bytes(self) -> int:
        """What it takes of the core's memory while it waits, about."""
        return waiting_bytes(len(self.tokens), self.sampling)

    def cached_digests(self, pool: BlockPool) -> list[bytes]:
        """Returns the digests of the blocks that a request which waits finds in the pool."""
        # The last token is always computed: its logits are what the step is for.
        num_usable = (len(self.tokens) - 1) // pool.block_size if pool.caches else 0
        self.extend_digests(self.tokens, num_usable, pool.block_size)
        usable = self.digests[1 : 1 + num_usable]
        return usable[: pool.num_matching(usable)]

    def extend_digests(self, tokens: Int32Array, num_blocks: int, block_size: int) -> None:
        """Computes the digests of the first `num_blocks` blocks of `tokens`."""
        for index in range(len(self.digests) - 1, num_blocks):
            block = tokens[index * block_size : (index + 1) * block_size]
            self.digests.append(block_digest(self.digests[-1], block))


def waiting_bytes(num_tokens: int, sampling: SamplingParams) -> int:
    """Returns what a request of so many tokens takes of the core's memory while it waits, about."""
    return (
        REQUEST_BYTES
        + 4 * num_tokens
        + BIAS_BYTES * len(sampling.logit_bias)
        + STOP_ID_BYTES * len(sampling.stop_token_ids)
    )
