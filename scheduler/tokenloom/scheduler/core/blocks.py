"""The block pool: who holds which block of the KV cache, and what can be found again.

A block is in exactly one of three places:

    free        nobody holds it, its content is worthless
    evictable   nobody holds it, its content can be found by digest; least recently used first
    held        one or more requests hold it; a shared block is full and only read

A full block is named by a digest that chains over all tokens before it, so
equal digests mean equal tokens, equal positions and equal salt.

Holders of a block share the seconds for which it is held. Each held block has a meter, which begins
at 0 and runs at 1 / holders: who reads it when taking the block and when giving it up knows its
part. It is kept as the time at which it would have begun had the holders never changed, so that
nothing is to be done while they do not:

    meter = (now - since) / holders
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


class PoolExhaustedError(RuntimeError):
    """More blocks were asked for than the pool can give."""


def root_digest(salt: str) -> bytes:
    """Returns the parent of a request's first block: requests of another salt share nothing."""
    return hashlib.sha256(salt.encode()).digest()


def block_digest(parent: bytes, tokens: Int32Array) -> bytes:
    """Returns the digest of a full block of `tokens` that follows `parent`."""
    return hashlib.sha256(parent + tokens.tobytes()).digest()


class BlockPool:
    """Owner of all blocks of one epoch. Every operation on a block is O(1)."""

    def __init__(self, num_blocks: int, block_size: int, *, cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caches = cache
        """Whether content is found again; without it digests are of no use."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._num_holders = [0] * num_blocks
        self.now_s = 0.0
        """To which holds are counted: the time of the latest plan or result, by its caller."""
        self._since_s = [0.0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by digest."""
        return len(self._blocks)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, evicting the least recently used. Raises PoolExhaustedError."""
        if count > self.num_free:
            raise PoolExhaustedError(f"{count} blocks wanted, {self.num_free} are free")
        first = max(0, len(self._free) - count)
        taken = self._free[first:]
        del self._free[first:]
        while len(taken) < count:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
            taken.append(block)
        for block in taken:
            self._num_holders[block] = 1
            self._since_s[block] = self.now_s
        return taken

    def meters_s(self, blocks: Iterable[int]) -> float:
        """Returns what the meters of held blocks show, in sum."""
        now_s, since_s, holders = self.now_s, self._since_s, self._num_holders
        return sum((now_s - since_s[block]) / holders[block] for block in blocks)

    def _set_holders(self, block: int, num_holders: int) -> None:
        """Changes how many hold a block; its meter goes on from where it stands."""
        old, now_s = self._num_holders[block], self.now_s
        if old == 0:
            self._since_s[block] = now_s
        else:
            self._since_s[block] = now_s - (now_s - self._since_s[block]) * num_holders / old
        self._num_holders[block] = num_holders

    def num_matching(self, digests: Sequence[bytes]) -> int:
        """Returns how many of the leading `digests` are cached."""
        count = 0
        for digest in digests:
            if digest not in self._blocks:
                break
            count += 1
        return count

    def num_evictable(self, digests: Sequence[bytes]) -> int:
        """Returns how many of the cached `digests` nobody holds: sharing them takes free blocks."""
        return sum(self._num_holders[self._blocks[digest]] == 0 for digest in digests)

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """Becomes a further holder of the cached blocks named by `digests`."""
        blocks = [self._blocks[digest] for digest in digests]
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._evictable[block]
            self._set_holders(block, self._num_holders[block] + 1)
        return blocks

    def register(self, block: int, digest: bytes) -> None:
        """Makes a full, computed block findable, unless an equal one already is."""
        if self.caches and digest not in self._blocks and self._digests[block] is None:
            self._blocks[digest] = block
            self._digests[block] = digest

    def release(self, blocks: Iterable[int], *, keep: bool = True) -> None:
        """Gives up one hold on each of a request's `blocks`, told in the order of its table.

        The last blocks are evicted first: a prefix is useless without its beginning.
        Without `keep`, what nobody else holds cannot be found any more.
        """
        for block in reversed(list(blocks)):
            holders = self._num_holders[block] - 1
            if holders < 0:
                raise AssertionError(f"block {block} is released but nobody holds it")
            self._set_holders(block, holders)
            if holders == 0:
                if not keep:
                    self._forget(block)
                if self._digests[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> list[str]:
        """Returns what is wrong, given the block tables of all running requests."""
        wrong = []
        holders = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            if holders[block] != self._num_holders[block]:
                wrong.append(
                    f"block {block} has {self._num_holders[block]} holders, "
                    f"tables name it {holders[block]} times"
                )
            elif holders[block] > 1 and self._digests[block] is None:
                wrong.append(f"block {block} is shared by {holders[block]} but was never full")
        unheld = {block for block in range(self.num_blocks) if self._num_holders[block] == 0}
        free, evictable = set(self._free), set(self._evictable)
        if len(free) != len(self._free):
            wrong.append("a block is free twice")
        if free & evictable:
            wrong.append(f"blocks {sorted(free & evictable)} are free and evictable")
        if free | evictable != unheld:
            wrong.append(f"blocks {sorted((free | evictable) ^ unheld)} are lost or given twice")
        for digest, block in self._blocks.items():
            if self._digests[block] != digest:
                wrong.append(f"block {block} is found by a digest that is not its own")
        if len(self._blocks) != sum(digest is not None for digest in self._digests):
            wrong.append("a block has a digest by which it cannot be found")
        if any(self._digests[block] is not None for block in free):
            wrong.append("a free block still has a digest")
        return wrong

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._blocks[digest]
            self._digests[block] = None
