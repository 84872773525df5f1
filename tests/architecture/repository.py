"""What the architecture tests look at: the files of this repository and its parts."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("protos", "scheduler", "worker", "client")
GENERATED_MARK = "_pb2"


@cache
def files() -> tuple[Path, ...]:
    """Returns what git tracks or would add, relative to the root; ignored files are left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = sorted({Path(name) for name in listed.split("\0") if name})
    return tuple(path for path in paths if (ROOT / path).is_file())


def read(path: Path) -> str | None:
    """Returns a file's text; None if it is binary."""
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def texts(*suffixes: str) -> Iterator[tuple[Path, str]]:
    """Yields the text files, all or those with a suffix."""
    for path in files():
        if not suffixes or path.suffix in suffixes:
            text = read(path)
            if text is not None:
                yield path, text


def python_sources() -> Iterator[tuple[Path, str]]:
    """Yields the Python files that were written by hand."""
    for path, text in texts(".py"):
        if GENERATED_MARK not in path.stem:
            yield path, text


def imported_modules(source: str) -> Iterator[str]:
    """Yields the absolute names of all that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def project(part: str) -> Mapping[str, Any]:
    """Returns the `[project]` table of a part."""
    with (ROOT / part / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


def run_python(script: str, *args: str, path: tuple[Path, ...], site: bool = True) -> str:
    """Runs a script in a fresh interpreter and returns what it printed.

    `path` comes first on its sys.path; with `site` off that and the standard library are all.
    Fails with the script's stderr.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    flags = [] if site else ["-S"]
    done = subprocess.run(
        [sys.executable, *flags, "-c", script, *args],
        cwd=path[0],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT_ALL = """
import importlib, json, pkgutil, sys

roots, absent = sys.argv[1].split(","), set(sys.argv[2].split(","))

def import_module(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in absent:
            raise

def walk(name):
    module = import_module(name)
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if info.name != "__main__" and not info.name.endswith("_pb2_grpc"):
            walk(f"{name}.{info.name}")

for root in roots:
    walk(root)
print(json.dumps(sorted(sys.modules)))
"""
"""Imports every module under argv[1] (commas between) and prints sys.modules as JSON; that one of
the packages in argv[2] is not installed is forgiven."""
