"""Where compiled code is kept: a folder that only this user writes to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.core_socket import environment
from tokenloom.worker.errors import LoadError
from tokenloom.worker.kernel_cache import keep_kernels

KEEP = (
    "import sys; from pathlib import Path; from tokenloom.worker.kernel_cache import keep_kernels"
)
VARIABLES = (
    "TRITON_CACHE_DIR",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED",
)


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsets what keep_kernels sets, and has it put back after the test."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(sys, "pycache_prefix", sys.pycache_prefix)
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)


def test_the_folder_asked_for_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "kernels"
    keep_kernels(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    kept = [os.environ[variable] for variable in VARIABLES]
    assert kept == [str(folder / "triton"), str(folder / "flash"), "1"]


def test_without_a_wish_kernels_are_kept_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_kernels(None)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "tokenloom" / "kernels" / "triton")


def test_a_variable_that_is_set_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    keep_kernels(tmp_path / "kernels")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(LoadError, match="has mode 777"):
        keep_kernels(tmp_path)


def test_a_users_cache_folder_that_is_of_no_use_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenloom").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_kernels(None)
    assert "compiled kernels are not kept" in caplog.text
    assert "TRITON_CACHE_DIR" not in os.environ


def _import_torch(site: Path, folder: Path) -> None:
    """Imports what `site` has for torch, as a worker does that may not write beside it."""
    code = f"{KEEP}; keep_kernels(Path({str(folder)!r})); import torch"
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(site), variables["PYTHONPATH"]])
    variables["PYTHONDONTWRITEBYTECODE"] = "1"
    subprocess.run([sys.executable, "-c", code], env=variables, check=True)


def _kept_bytecode(folder: Path) -> list[str]:
    return [path.name.partition(".")[0] for path in folder.rglob("*.pyc")]


def test_bytecode_is_kept_where_torch_comes_without(tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "kernels"
    site.mkdir()
    (site / "torch.py").write_text("import beside_torch")
    (site / "beside_torch.py").touch()
    _import_torch(site, folder)
    assert sorted(_kept_bytecode(folder)) == ["beside_torch", "torch"]
    assert not list(site.rglob("*.pyc"))


def test_bytecode_that_was_installed_is_used_where_it_is(tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "kernels"
    site.mkdir()
    (site / "torch.py").touch()
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(site)], check=True)
    _import_torch(site, folder)
    assert _kept_bytecode(folder) == []


def test_a_packages_bytecode_is_compiled_beside_its_import(tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "kernels"
    (site / "torch" / "nn").mkdir(parents=True)
    for name in ("__init__", "later", "nn/__init__", "nn/deep"):
        (site / "torch" / f"{name}.py").touch()
    (site / "torch" / "broken.py").write_text("for")
    (site / "other.py").touch()
    code = (
        "from pathlib import Path; from tokenloom.worker.bytecode import compile_packages;"
        f" compile_packages(Path({str(folder)!r}), 2)"
    )
    # -S: only what this test has put there is a package.
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(site), variables["PYTHONPATH"]])
    subprocess.run([sys.executable, "-S", "-c", code], env=variables, check=True)
    assert sorted(_kept_bytecode(folder)) == ["__init__", "__init__", "deep", "later"]
    assert not list(site.rglob("*.pyc"))
