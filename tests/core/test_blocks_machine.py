"""The block pool against a naive model, step by step in any order."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from tokenloom.scheduler.core.blocks import (
    BlockPool,
    PoolExhaustedError,
    block_digest,
    root_digest,
)

BLOCK_SIZE = 2


class NaivePool:
    """The same contract, written for the reader: who holds what, what is found, in what order."""

    def __init__(self, num_blocks: int) -> None:
        self.holders = dict.fromkeys(range(num_blocks), 0)
        self.content: dict[int, bytes] = {}
        self.released: OrderedDict[int, None] = OrderedDict()
        """Cached and unheld, least recently used first."""

    def free(self) -> set[int]:
        return {block for block, count in self.holders.items() if count == 0}

    def take(self, block: int) -> None:
        if block in self.content:
            assert not self.free() - self.released.keys(), "evicted though worthless ones were free"
            assert block == next(iter(self.released)), "not the least recently used was evicted"
            del self.released[block], self.content[block]
        self.holders[block] = 1

    def release(self, block: int, *, keep: bool) -> None:
        self.holders[block] -= 1
        if self.holders[block] == 0 and not keep:
            self.content.pop(block, None)
        if self.holders[block] == 0 and block in self.content:
            self.released[block] = None


class BlockPoolMachine(RuleBasedStateMachine):
    """Requests take, share, fill and release blocks."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(1, 12))
    def begin(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.naive = NaivePool(num_blocks)
        self.held: list[list[int]] = []
        self.before_s: dict[int, float] = {}
        """What the meters of a table's blocks showed when they were taken, by the table's id."""
        self.parts_s: dict[int, float] = {}
        """Block-seconds of each table, by the naive rule: each second is shared by the holders."""

    @rule(target=tables, count=st.integers(1, 6))
    def allocate(self, count: int) -> list[int]:
        if count > len(self.naive.free()):
            with pytest.raises(PoolExhaustedError):
                self.pool.allocate(count)
            return []
        table = self.pool.allocate(count)
        assert len(set(table)) == count
        for block in table:
            assert self.naive.holders[block] == 0
            self.naive.take(block)
        return self.hold(table)

    def hold(self, table: list[int]) -> list[int]:
        self.held.append(table)
        self.before_s[id(table)] = self.pool.meters_s(table)
        self.parts_s[id(table)] = 0.0
        return table

    @rule(seconds=st.floats(0.001, 100.0))
    def wait(self, seconds: float) -> None:
        self.pool.now_s += seconds
        for table in self.held:
            holders = (self.naive.holders[block] for block in table)
            self.parts_s[id(table)] += sum(seconds / count for count in holders)

    @rule(table=tables, tokens=st.lists(st.integers(0, 1), min_size=12, max_size=12))
    def fill(self, table: list[int], tokens: list[int]) -> None:
        """A request's blocks are full: those whose content is new can be found from now on."""
        if table not in self.held:
            return
        for block, digest in zip(table, digests(tokens, len(table)), strict=True):
            self.pool.register(block, digest)
            if block not in self.naive.content and digest not in self.naive.content.values():
                self.naive.content[block] = digest

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=12, max_size=12))
    def share(self, tokens: list[int]) -> list[int]:
        wanted = digests(tokens, 6)
        by_digest = {digest: block for block, digest in self.naive.content.items()}
        expected = []
        for digest in wanted:
            if digest not in by_digest:
                break
            expected.append(by_digest[digest])
        count = self.pool.num_matching(wanted)
        assert count == len(expected)
        unheld = sum(self.naive.holders[block] == 0 for block in expected)
        assert self.pool.num_evictable(wanted[:count]) == unheld
        table = self.pool.share(wanted[:count])
        assert table == expected
        for block in table:
            self.naive.released.pop(block, None)
            self.naive.holders[block] += 1
        return self.hold(table) if table else table

    @rule(table=consumes(tables), keep=st.booleans())
    def release(self, table: list[int], keep: bool) -> None:
        if not table:
            return
        self.held = [other for other in self.held if other is not table]
        part_s = self.pool.meters_s(table) - self.before_s[id(table)]
        assert part_s == pytest.approx(self.parts_s[id(table)], abs=1e-6)
        self.pool.release(table, keep=keep)
        for block in reversed(table):
            self.naive.release(block, keep=keep)

    @invariant()
    def agrees_with_the_naive_pool(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.check(self.held) == []
        assert self.pool.num_free == len(self.naive.free())
        assert self.pool.num_cached == len(self.naive.content)
        num_held = sum(count > 0 for count in self.naive.holders.values())
        assert self.pool.num_free + num_held == self.pool.num_blocks


def digests(tokens: list[int], count: int) -> list[bytes]:
    """Returns the chained digests of the first `count` blocks."""
    chain = [root_digest("")]
    for index in range(count):
        block = np.array(tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE], np.int32)
        chain.append(block_digest(chain[-1], block))
    return chain[1:]


BlockPoolMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
TestBlockPool = BlockPoolMachine.TestCase


def test_check_finds_a_lost_block() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    table = pool.allocate(2)
    assert pool.check([table]) == []
    assert pool.check([]) != []
    assert pool.check([table, table[:1]]) != []


def test_releasing_an_unheld_block_is_an_error() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.release([0])


def test_digest_depends_on_salt_position_and_every_token_before() -> None:
    block = np.array([5, 6], np.int32)
    other = np.array([5, 7], np.int32)
    named = {
        block_digest(root_digest(""), block),
        block_digest(root_digest("salt"), block),
        block_digest(block_digest(root_digest(""), block), block),
        block_digest(block_digest(root_digest(""), other), block),
    }
    assert len(named) == 4


def test_a_pool_without_cache_finds_nothing() -> None:
    pool = BlockPool(2, BLOCK_SIZE, cache=False)
    table = pool.allocate(1)
    wanted = digests([1, 2], 1)
    pool.register(table[0], wanted[0])
    assert pool.num_matching(wanted) == 0
