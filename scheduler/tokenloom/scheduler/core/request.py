"""A request, as the core knows it from submission to finish."""

from __future__ import annotations

from dataclasses import dataclass

from tokenloom.scheduler.core.blocks import Int32Array, block_digest
from tokenloom.wire.messages import SamplingParams


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

    def extend_digests(self, tokens: Int32Array, num_blocks: int, block_size: int) -> None:
        """Computes the digests of the first `num_blocks` blocks of `tokens`."""
        for index in range(len(self.digests) - 1, num_blocks):
            block = tokens[index * block_size : (index + 1) * block_size]
            self.digests.append(block_digest(self.digests[-1], block))
