from __future__ import annotations

from collections import Counter

import pytest

from tokenloom.client import InvalidRequest, LimitExceeded, Overloaded, TokenloomError, Unavailable
from tokenloom.client.affinity import Affinity, Visit, session_metadata

REPLICAS = ("10.0.0.1:50051", "10.0.0.2:50051", "10.0.0.3:50051")
SESSIONS = [f"user-{number}" for number in range(3000)]


def homes(affinity: Affinity, now_s: float = 0.0) -> list[str | None]:
    return [affinity.replica_of(session, now_s) for session in SESSIONS]


def test_sessions_are_spread_evenly_and_by_their_names_alone() -> None:
    counts = Counter(homes(Affinity(REPLICAS)))
    assert list(counts.values()) == pytest.approx([1000] * 3, rel=0.1)
    assert homes(Affinity(REPLICAS)) == homes(Affinity(REPLICAS[::-1]))


def test_a_replica_that_goes_moves_its_own_sessions_only() -> None:
    before = homes(Affinity(REPLICAS))
    after = homes(Affinity(REPLICAS[1:]))
    for old, new in zip(before, after, strict=True):
        assert new == old or old == REPLICAS[0]
    moved = Counter(new for old, new in zip(before, after, strict=True) if new != old)
    assert list(moved.values()) == pytest.approx([500, 500], rel=0.15)


def test_a_replica_that_refuses_is_left_alone_as_long_as_it_asks() -> None:
    affinity = Affinity(REPLICAS)
    home = affinity.replica_of("me", 0.0)
    assert home is not None
    assert affinity.is_turned_away(home, Overloaded("full", retry_after_s=7.0), 100.0)
    assert affinity.replica_of("me", 106.9) != home
    assert affinity.replica_of("me", 107.0) == home


def test_where_all_refuse_the_balancing_decides() -> None:
    affinity = Affinity(REPLICAS)
    for replica in REPLICAS:
        assert affinity.is_turned_away(replica, Unavailable("no model"), 100.0)
    assert affinity.replica_of("me", 100.5) is None


@pytest.mark.parametrize(
    "error", [InvalidRequest("top_p"), LimitExceeded("too slow"), Overloaded("never")]
)
def test_what_is_wrong_everywhere_moves_no_session(error: TokenloomError) -> None:
    visit = Visit(Affinity(REPLICAS), "me")
    home = visit.replica
    assert not visit.moves_on(error)
    assert Visit(visit._affinity, "me").replica == home


def test_a_completion_that_began_is_not_begun_elsewhere() -> None:
    visit = Visit(Affinity(REPLICAS), "me")
    visit.stays()
    assert not visit.moves_on(Unavailable("broken"))


def test_calls_without_a_session_or_without_known_replicas_go_where_the_balancing_says() -> None:
    assert Visit(Affinity(REPLICAS), None).replica is None
    assert Visit(Affinity(()), "me").replica is None
    assert session_metadata(None) == ()


def test_a_proxy_sees_a_sessions_digest_and_not_its_name() -> None:
    ((name, value),) = session_metadata("Jürgen")
    assert name == "tokenloom-session"
    assert value.isascii()
    assert "J" not in value
    assert session_metadata("Jürgen") == session_metadata("Jürgen") != session_metadata("Jörgen")
