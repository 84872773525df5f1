"""Tenants of a real server: what they share, what they may have, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server
from tokenloom.client import Client, InvalidRequest, Overloaded
from tokenloom.scheduler.bearer import new_token
from tokenloom.scheduler.tenants import digest_of_token

ROOT = Path(__file__).parents[2]
TOKENS = {name: new_token() for name in ("alone", "team-a", "team-b", "bounded")}
MORE = {
    "team-a": 'cache_group = "team"',
    "team-b": 'cache_group = "team"',
    "bounded": "max_tokens = 3\ntokens_per_minute = 100",
}
PROMPT = [5] * 80


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    path.write_text(
        "\n".join(
            f'[tenants.{name}]\ntoken_sha256 = ["{digest_of_token(token)}"]\n{MORE.get(name, "")}'
            for name, token in TOKENS.items()
        )
    )
    with Server.of_fake(ROOT / "models" / "pocket", f"--tenants={path}") as server:
        yield server


def client(server: Server, name: str) -> Client:
    return server.client(token=TOKENS[name])


def num_cached(server: Server, name: str) -> int:
    with client(server, name) as caller:
        result = caller.generate(PROMPT, max_tokens=2).result()
    return result.usage.num_cached_tokens


def test_a_tenants_cached_prompt_is_found_by_itself_and_its_group_alone(server: Server) -> None:
    assert num_cached(server, "team-a") == 0
    assert num_cached(server, "alone") == 0
    assert num_cached(server, "team-b") > 0
    assert num_cached(server, "alone") > 0


def test_a_tenant_gets_no_more_tokens_than_it_may(server: Server) -> None:
    with client(server, "bounded") as caller:
        with pytest.raises(InvalidRequest, match=r"max_tokens: is 4; this tenant may have 3"):
            caller.generate([5], max_tokens=4).result()
        assert caller.generate([5] * 60).result().usage.num_completion_tokens <= 3
        caller.generate([5] * 60, max_tokens=1).result()
        with pytest.raises(Overloaded) as refused:
            caller.generate([5], max_tokens=1).result()
    assert refused.value.reason == "TENANT_LIMIT"
    assert refused.value.retry_after_s is not None


@pytest.mark.parametrize("priority", [-101, 101])
def test_a_priority_out_of_range_is_refused(server: Server, priority: int) -> None:
    with client(server, "alone") as caller:
        caller.generate([5], max_tokens=1, priority=100).result()
        with pytest.raises(InvalidRequest, match="priority: is"):
            caller.generate([5], max_tokens=1, priority=priority).result()
