from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from tokenloom.scheduler.config import ConfigError
from tokenloom.scheduler.tenants import Tenant, Tenants, TenantsFile

TOKEN = "a-token-of-search"
DIGEST = hashlib.sha256(TOKEN.encode()).hexdigest()
SPIFFE_ID = "spiffe://example.org/ns/batch/sa/nightly"
TEXT = f"""
anonymous = "guests"

[tenants.search]
weight = 4
max_requests = 64
max_waiting_requests = 32
max_tokens = 1024
token_sha256 = ["{DIGEST}"]

[tenants.batch]
tokens_per_minute = 200_000
cache_group = "search"
spiffe_ids = ["{SPIFFE_ID}"]

[tenants.guests]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(TEXT)
    return path


def replace(path: Path, text: str) -> None:
    """Puts a new version in the file's place, as configuration tools do it."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


def test_a_file_tells_of_each_tenant_what_it_may(path: Path) -> None:
    tenants = Tenants.read(path)
    assert tenants.by_name == {
        "search": Tenant(
            name="search",
            weight=4.0,
            max_requests=64,
            max_waiting_requests=32,
            max_tokens=1024,
            token_sha256=(DIGEST,),
        ),
        "batch": Tenant(
            name="batch",
            tokens_per_minute=200_000,
            cache_group="search",
            spiffe_ids=(SPIFFE_ID,),
        ),
        "guests": Tenant(name="guests"),
    }
    assert tenants.anonymous == tenants.by_name["guests"]


def test_cached_prompts_are_a_tenants_own_unless_it_shares_them(path: Path) -> None:
    tenants = Tenants.read(path).by_name
    assert {tenant.cache_group for tenant in tenants.values()} == {"search", "guests"}


def test_callers_are_found_by_token_and_by_spiffe_id(path: Path) -> None:
    tenants = Tenants.read(path)
    assert tenants.with_token(TOKEN) == tenants.by_name["search"]
    assert tenants.with_spiffe_id(SPIFFE_ID) == tenants.by_name["batch"]
    for stranger in (DIGEST, "", TOKEN + " ", "\udcff"):
        assert tenants.with_token(stranger) is None
    assert tenants.with_spiffe_id("spiffe://example.org/ns/batch/sa/nightly2") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "1 to 1000 tables"),
        ("[tenants]", "1 to 1000 tables"),
        ("tenants = 3", "1 to 1000 tables"),
        ("[tenants.a]\n[tenant.b]", "there is no tenant"),
        ("[tenants.a", "tenants.toml"),
        ("[tenants]\na = 3", "tenants.a must be a table"),
        ("[tenants.a]\nwieght = 2", "tenants.a has no wieght; it has cache_group,"),
        ('[tenants.a]\nname = "b"', "tenants.a has no name"),
        ('[tenants."a b"]', "'a b' is no tenant's name"),
        ('[tenants.""]', "'' is no tenant's name"),
        ("[tenants.a]\nweight = 0", "tenants.a.weight is 0.0"),
        ("[tenants.a]\nweight = nan", "tenants.a.weight is nan"),
        ("[tenants.a]\nweight = inf", "tenants.a.weight is inf"),
        ("[tenants.a]\nmax_requests = 0", "tenants.a.max_requests is 0; it must be at least 1"),
        ('[tenants.a]\nmax_requests = "many"', "$.max_requests"),
        ('[tenants.a]\ntoken_sha256 = "x"', "$.token_sha256"),
        ('[tenants.a]\ntoken_sha256 = ["secret"]', "an entry of 6 characters"),
        ('[tenants.a]\nspiffe_ids = ["https://a/b"]', "'https://a/b'"),
        ('[tenants.a]\nspiffe_ids = ["spiffe://a"]', "'spiffe://a'"),
        ('[tenants.a]\ncache_group = "a b"', "tenants.a.cache_group is 'a b'"),
        ('anonymous = "b"\n[tenants.a]', "anonymous is 'b', which is no tenant"),
        (
            f'[tenants.a]\ntoken_sha256 = ["{DIGEST}"]\n[tenants.b]\ntoken_sha256 = ["{DIGEST}"]',
            "a and b have the same entry in token_sha256",
        ),
        (
            f'[tenants.a]\nspiffe_ids = ["{SPIFFE_ID}"]\n[tenants.b]\nspiffe_ids = ["{SPIFFE_ID}"]',
            "a and b have the same entry in spiffe_ids",
        ),
        ("".join(f"[tenants.t{number}]\n" for number in range(1001)), "1 to 1000 tables"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(path: Path, text: str, told: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Tenants.read(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_token_in_the_place_of_its_digest_is_not_told_to_the_log(path: Path) -> None:
    path.write_text('[tenants.a]\ntoken_sha256 = ["the token itself"]')
    with pytest.raises(ConfigError) as caught:
        Tenants.read(path)
    assert "the token itself" not in str(caught.value)


def test_a_file_that_is_absent_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Tenants.read(tmp_path / "nowhere")
    (tmp_path / "noise").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="noise"):
        Tenants.read(tmp_path / "noise")


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(path: Path) -> None:
    file = TenantsFile(path)
    assert not file.refresh()
    before = file.tenants
    replace(path, TEXT + "\n[tenants.fresh]\n")
    assert file.refresh()
    assert file.tenants.by_name.keys() - before.by_name.keys() == {"fresh"}
    assert not file.refresh()


def test_a_file_written_in_place_is_read_again(path: Path) -> None:
    file = TenantsFile(path)
    path.write_text("[tenants.other]\n")
    assert file.refresh()
    assert file.tenants.by_name.keys() == {"other"}


def test_a_folder_swapped_under_a_link_as_kubernetes_does_it_is_read_again(tmp_path: Path) -> None:
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "tenants.toml").write_text(f"[tenants.{version}]")
    os.utime(tmp_path / "one" / "tenants.toml", (0, 0))
    os.utime(tmp_path / "two" / "tenants.toml", (0, 0))
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "tenants.toml").symlink_to("data/tenants.toml")
    file = TenantsFile(tmp_path / "tenants.toml")
    (tmp_path / "fresh").symlink_to("two")
    (tmp_path / "fresh").replace(tmp_path / "data")
    assert file.refresh()
    assert file.tenants.by_name.keys() == {"two"}


@pytest.mark.parametrize(
    "broken", ["[tenants", "[tenants.a]\nweight = -1", "", f"a = {'[' * 100_000}"]
)
def test_a_broken_new_file_leaves_the_old_one_in_force_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    file = TenantsFile(path)
    before = file.tenants
    replace(path, broken)
    with caplog.at_level(logging.ERROR):
        assert not file.refresh()
        assert not file.refresh()
    assert file.tenants is before
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    replace(path, "[tenants.mended]")
    assert file.refresh()
    assert file.tenants.by_name.keys() == {"mended"}


def test_a_file_that_is_gone_for_a_while_leaves_the_old_one_in_force(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = TenantsFile(path)
    before = file.tenants
    path.unlink()
    with caplog.at_level(logging.ERROR):
        assert not file.refresh()
    assert file.tenants is before
    assert "stay as they were" in caplog.text
    path.write_text("[tenants.back]")
    assert file.refresh()
