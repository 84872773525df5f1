from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import zmq
import zmq.auth

from tokenloom.wire.keys import KeyFileError, KeyPair, is_private, read_key_pair, read_public_key


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Returns a public and a secret file, as the library writes them."""
    public, secret = (Path(path) for path in zmq.auth.create_certificates(tmp_path, "worker"))
    secret.chmod(0o600)
    return public, secret


def test_keys_are_those_that_the_library_reads(files: tuple[Path, Path]) -> None:
    public, secret = files
    expected_public, expected_secret = zmq.auth.load_certificate(secret)
    assert expected_secret is not None
    assert read_public_key(public) == read_public_key(secret) == expected_public
    pair = read_key_pair(secret)
    assert pair == KeyPair(public=expected_public, secret=expected_secret)
    assert zmq.curve_public(pair.secret) == pair.public


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o660, 0o644, 0o666, 0o610])
def test_a_secret_that_others_can_read_is_refused(files: tuple[Path, Path], mode: int) -> None:
    _, secret = files
    secret.chmod(mode)
    with pytest.raises(KeyFileError, match=f"has mode {mode:o}; it must be 600"):
        read_key_pair(secret)


@pytest.mark.parametrize(
    ("owner", "mode", "allowed"),
    [
        (1000, 0o600, True),
        (1000, 0o400, True),
        (1000, 0o640, False),
        (1000, 0o440, False),
        (0, 0o600, True),
        (0, 0o640, True),  # a secret of Kubernetes for a container with an fsGroup
        (0, 0o440, True),
        (0, 0o460, False),
        (0, 0o644, False),
        (0, 0o4600, False),
    ],
)
def test_a_group_reads_secrets_of_roots_alone(owner: int, mode: int, allowed: bool) -> None:
    status = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, 1000, 100, 0, 0, 0))
    assert is_private(status) == allowed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "curve\n",
        'public-key = ""',
        'public-key = "too-short"',
        f'public-key = "{"a" * 41}"',
        f'public-key = "{"a" * 39}~"',
        f'# public-key = "{"a" * 40}"',
    ],
)
def test_what_is_no_key_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "worker.key"
    file.write_text(text)
    with pytest.raises(KeyFileError, match=r"worker\.key has no public key"):
        read_public_key(file)


def test_a_public_file_is_no_secret(files: tuple[Path, Path]) -> None:
    public, _ = files
    public.chmod(0o600)
    with pytest.raises(KeyFileError, match="has no secret key"):
        read_key_pair(public)


def test_what_cannot_be_read_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"absent\.key cannot be read"):
        read_public_key(tmp_path / "absent.key")
    (tmp_path / "binary.key").write_bytes(b"\xff\xfe")
    with pytest.raises(KeyFileError, match=r"binary\.key cannot be read"):
        read_public_key(tmp_path / "binary.key")
