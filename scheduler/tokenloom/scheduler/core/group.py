"""The workers that hold one model together: who they are, and what each said of itself.

    gathering ── as many Hellos as there are ranks ──▶ told ── as many Readys ──▶ ready

Whoever comes first is rank 0. A group that has lost a rank is of no use: another one is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenloom.wire.messages import Hello, Ready


class GroupError(ValueError):
    """The ranks of a group contradict each other or offer too little."""


@dataclass(slots=True, kw_only=True)
class Rank:
    """One worker of a group."""

    identity: bytes
    """Names its connection."""
    hello: Hello
    ready: Ready | None = None


class Group:
    """The ranks of one epoch, in order."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.ranks: list[Rank] = []

    @property
    def is_complete(self) -> bool:
        """Whether all ranks have come."""
        return len(self.ranks) == self.world_size

    @property
    def rendezvous(self) -> str:
        """Where the ranks meet; empty if there is only one."""
        return self.ranks[0].hello.address if self.world_size > 1 else ""

    @property
    def pids(self) -> list[int]:
        """The processes, as they name themselves."""
        return [rank.hello.pid for rank in self.ranks]

    def index(self, identity: bytes) -> int | None:
        """Returns the rank that has this connection, None if it is nobody's."""
        for index, rank in enumerate(self.ranks):
            if rank.identity == identity:
                return index
        return None

    def join(self, identity: bytes, hello: Hello) -> bool:
        """Takes a worker in, unless it has come before; returns whether it is new."""
        is_new = self.index(identity) is None
        if is_new:
            self.ranks.append(Rank(identity=identity, hello=hello))
        return is_new

    def enter(self, index: int, ready: Ready) -> Ready | None:
        """Takes what a rank offers; returns what all of them do once the last has said it.

        Raises GroupError.
        """
        self.ranks[index].ready = ready
        offers = [rank.ready for rank in self.ranks if rank.ready is not None]
        return _together(offers) if len(offers) == self.world_size else None


def _together(offers: list[Ready]) -> Ready:
    """Returns what ranks offer together: the least of each, and all of their memory."""
    shapes = {(offer.block_size, offer.vocab_size) for offer in offers}
    if len(shapes) > 1:
        raise GroupError(f"ranks differ in (block size, vocabulary): {sorted(shapes)}")
    fingerprints = {offer.fingerprint for offer in offers}
    if len(fingerprints) > 1:
        raise GroupError(f"ranks have loaded different models: {sorted(fingerprints)}")
    return Ready(
        epoch=offers[0].epoch,
        num_blocks=min(offer.num_blocks for offer in offers),
        block_size=offers[0].block_size,
        vocab_size=offers[0].vocab_size,
        max_model_tokens=min(offer.max_model_tokens for offer in offers),
        max_step_tokens=min(offer.max_step_tokens for offer in offers),
        weights_bytes=sum(offer.weights_bytes for offer in offers),
        kv_bytes=sum(offer.kv_bytes for offer in offers),
        phases=max((offer.phases for offer in offers), key=_whole_s),
        fingerprint=offers[0].fingerprint,
    )


def _whole_s(phases: tuple[tuple[str, float], ...]) -> float:
    return sum(seconds for _, seconds in phases)
