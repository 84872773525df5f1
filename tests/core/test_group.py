"""How workers become a group, and what they offer together."""

from __future__ import annotations

import msgspec
import pytest

from tokenloom.scheduler.core.group import Group, GroupError
from tokenloom.wire.messages import PROTOCOL_VERSION, Hello, Ready

READY = Ready(
    epoch=1,
    num_blocks=100,
    block_size=16,
    vocab_size=97,
    max_model_tokens=64,
    max_step_tokens=512,
    weights_bytes=10,
    kv_bytes=20,
    phases=(("imports", 1.0),),
)


def hello(pid: int) -> Hello:
    return Hello(
        protocol_version=PROTOCOL_VERSION, pid=pid, device="cpu", address=f"127.0.0.1:{pid}"
    )


def two() -> Group:
    group = Group(2)
    assert group.join(b"a", hello(7))
    assert not group.join(b"a", hello(7))  # it repeats itself
    assert not group.is_complete
    assert group.join(b"b", hello(8))
    return group


def test_ranks_are_given_in_order_of_arrival_and_meet_at_rank_0() -> None:
    group = two()
    assert group.is_complete
    assert [group.index(b"a"), group.index(b"b"), group.index(b"c")] == [0, 1, None]
    assert group.rendezvous == "127.0.0.1:7"
    assert group.pids == [7, 8]


def test_who_is_alone_meets_nobody() -> None:
    group = Group(1)
    group.join(b"a", hello(7))
    assert group.is_complete
    assert group.rendezvous == ""


def test_a_group_offers_the_least_of_each_rank_and_the_memory_of_all() -> None:
    group = two()
    other = msgspec.structs.replace(
        READY, num_blocks=90, max_step_tokens=1024, phases=(("imports", 2.0),)
    )
    assert group.enter(1, other) is None
    offer = group.enter(0, READY)
    assert offer == msgspec.structs.replace(
        READY, num_blocks=90, weights_bytes=20, kv_bytes=40, phases=(("imports", 2.0),)
    )


def test_ranks_that_differ_in_shape_are_no_group() -> None:
    group = two()
    group.enter(0, READY)
    with pytest.raises(GroupError, match="vocabulary"):
        group.enter(1, msgspec.structs.replace(READY, vocab_size=98))


def test_ranks_of_different_checkpoints_are_no_group() -> None:
    group = two()
    group.enter(0, msgspec.structs.replace(READY, fingerprint="one"))
    with pytest.raises(GroupError, match="different models"):
        group.enter(1, msgspec.structs.replace(READY, fingerprint="another"))
