import re
from pathlib import Path

import pytest

from tests.architecture.repository import GENERATED_MARK, imported_modules, python_sources, texts

MAX_LINES = 600
THIS = Path("tests/architecture/test_sources.py")
WRITTEN_BY_HAND = {".py", ".md", ".proto", ".toml", ".yaml", ".yml", ".sh"}

# Spelled so that this file does not find itself.
UNFINISHED = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")))
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:" + "|".join(("wo" + "rk", "ho" + "me")) + r")/\w")
REGISTRY = re.compile("|".join(("regi" + "stry.npmjs", "py" + "pi.org", "index" + "-url")))
PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALL = re.compile(
    r"\b(?:send_pyobj|recv_pyobj|weights_only\s*=\s*False|allow_pickle\s*=\s*True|torch\.load)\b"
)
EXEMPTION = re.compile(r"#\s*(?:ruff:\s*)?noqa\b:?\s*(?:[A-Z]+[0-9]+[,\s]*)*(?P<reason>.*)$")


def places(pattern: re.Pattern[str], *suffixes: str) -> list[str]:
    """Returns file:line of each match."""
    return [
        f"{path}:{number}"
        for path, text in texts(*suffixes)
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_file_is_longer_than_600_lines() -> None:
    lengths = {
        str(path): text.count("\n")
        for path, text in texts(*WRITTEN_BY_HAND)
        if GENERATED_MARK not in path.stem
    }
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_nothing_is_left_for_later() -> None:
    assert places(UNFINISHED, ".py", ".md", ".proto", ".toml", ".yaml", ".yml", ".sh", "") == []


def test_no_path_of_a_machine_is_written_down() -> None:
    assert places(MACHINE_PATH) == []


def test_no_registry_address_is_written_down() -> None:
    assert places(REGISTRY) == []


def test_nothing_is_pickled() -> None:
    importers = [
        f"{path} imports {module}"
        for path, source in python_sources()
        for module in imported_modules(source)
        if module.partition(".")[0] in PICKLING
    ]
    assert importers == []
    assert [
        place for place in places(PICKLING_CALL, ".py") if not place.startswith(f"{THIS}:")
    ] == []


def reason_of(line: str) -> str | None:
    """Returns what stands behind the codes of a `noqa`, None if the line has none."""
    found = EXEMPTION.search(line)
    return found and found["reason"].strip(" #:-()")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x = 1", None),
        ("x = 1  # noqa: S311", ""),
        ("x = 1  # noqa: S311, PLR0913", ""),
        ("x = 1  # noqa: S311 - seeded, no secret", "seeded, no secret"),
        ("x = 1  # noqa: S311  # seeded", "seeded"),
        ("# ruff: noqa: N802 - named by the proto files", "named by the proto files"),
    ],
)
def test_reason_is_what_follows_the_codes(line: str, reason: str | None) -> None:
    assert reason_of(line) == reason


def test_each_noqa_has_its_reason() -> None:
    bare = []
    for path, source in python_sources():
        if path == THIS:
            continue
        before = ""
        for number, line in enumerate(source.splitlines(), start=1):
            if reason_of(line) == "" and not before.lstrip().startswith("#"):
                bare.append(f"{path}:{number}")
            before = line
    assert bare == []
