import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.repository import ROOT, project
from tests.architecture.test_parts import pins
from tests.deploy.dockerfile import Stage, copied, read_stages

IMAGES = ROOT / "deploy/images"
DOCKERFILE = IMAGES / "Dockerfile"
STAGES = read_stages(DOCKERFILE)
FINAL = ("scheduler", "worker", "cpu")
OTHER_THAN_IN_TESTS = {"triton": ("worker",), "torch": ("cpu",)}
"""Packages whose version or build differs from that of constraints.txt, and where."""
LOCKED = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+) \\$", re.MULTILINE)
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def lock_of(image: str) -> dict[str, str]:
    """Returns the version of each package that an image installs."""
    found = LOCKED.finditer((IMAGES / f"{image}.lock").read_text())
    return {canonicalize_name(each["name"]): each["version"] for each in found}


def lines_of(image: str) -> list[str]:
    """Returns what an image's .in file asks for, without comments."""
    lines = (IMAGES / f"{image}.in").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def wanted_by(image: str) -> Iterator[Requirement]:
    """Yields what an image's own parts require directly, with the extras that it asks for."""
    for line in lines_of(image):
        found = re.fullmatch(r"\./(\w+)(?:\[(.*)\])?", line)
        if found is None:
            yield Requirement(line)
            continue
        table = project(found[1])
        optional = table.get("optional-dependencies", {})
        extras = (each for extra in (found[2] or "").split(",") for each in optional.get(extra, ()))
        yield from map(Requirement, (*table.get("dependencies", ()), *extras))


@pytest.mark.parametrize("image", FINAL)
def test_locks_hold_all_that_the_parts_require(image: str) -> None:
    lock = lock_of(image)
    for requirement in wanted_by(image):
        if requirement.name.startswith("tokenloom-"):
            continue
        name = canonicalize_name(requirement.name)
        assert name in lock, f"{image}.lock lacks {requirement}; `make lock` adds it"
        assert requirement.specifier.contains(lock[name]), f"{requirement}: {lock[name]} is locked"


@pytest.mark.parametrize("image", FINAL)
def test_images_run_the_versions_that_the_tests_run(image: str) -> None:
    pinned = pins()
    differing = {
        f"{name} {version}, tested with {pinned[name]}"
        for name, version in lock_of(image).items()
        if name in pinned and version != pinned[name]
        if image not in OTHER_THAN_IN_TESTS.get(name, ())
    }
    assert differing == set()
    assert lock_of("cpu")["torch"].partition("+")[0] == pinned["torch"]


@pytest.mark.parametrize("image", [*FINAL, "build"])
def test_every_line_of_a_lock_is_a_version_or_its_hash(image: str) -> None:
    lines = (IMAGES / f"{image}.lock").read_text().splitlines()
    assert [line for line in lines if not (LOCKED.match(line) or HASH.match(line))] == []


@pytest.mark.parametrize("image", FINAL)
def test_every_image_ends_as_a_user_without_rights_and_without_a_build_stage(image: str) -> None:
    users: list[str] = []
    stage: Stage | None = STAGES[image]
    while stage is not None:
        users = [*stage.arguments("USER"), *users]
        stage = STAGES.get(stage.base)
    assert users[-1] == "65532:65532"
    assert STAGES[image].base == "runtime"
    assert "COPY" not in {step for step, _ in STAGES["runtime"].steps}


def test_everything_that_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    for stage in STAGES.values():
        for rest in stage.arguments("COPY"):
            if rest.startswith("--from="):
                continue
            for source in copied(rest)[0]:
                assert (ROOT / source).exists(), source
                assert any(Path(source).match(each) for each in kept), source


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        ["hadolint", "--no-color", "--config", IMAGES / "hadolint.yaml", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.stdout + done.stderr == ""


def test_install_steps_of_the_scheduler_make_an_environment_that_works(tmp_path: Path) -> None:
    """The Dockerfile's own steps, with /opt and /src moved below a fresh folder."""

    def moved(text: str) -> str:
        return re.sub(r"(?<![\w.])/(opt|src)/", rf"{tmp_path}/\1/", text)

    (tmp_path / "src").mkdir()
    for stage in ("builder", "scheduler-builder"):
        for instruction, rest in STAGES[stage].steps:
            if instruction == "COPY":
                (source,), destination = copied(moved(rest))
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, destination)
            elif instruction == "RUN":
                run("bash", "-euo", "pipefail", "-c", moved(rest))
    binaries = tmp_path / "opt/tokenloom/bin"
    run(tmp_path / "opt/build/bin/pip", "--python", binaries / "python", "check")
    assert "scheduler  from tokenloom-scheduler" in run(binaries / "tokenloom", "--help")
    assert "--run-dir" in run(binaries / "tokenloom", "scheduler", "--help")
    run(binaries / "python", "-c", "import tokenloom.scheduler.front.server")
    script = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert run(binaries / "python", "-c", script) == "None\n"


def run(*command: str | Path) -> str:
    """Runs a command outside of the tests' own environment; returns what it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
