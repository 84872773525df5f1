import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.architecture.repository import IMPORT_ALL, PARTS, ROOT, files, run_python

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
SDK_NEEDS = ("grpc", "google/protobuf", "google/_upb", "typing_extensions.py")
"""All of site-packages that the client may use: grpcio, protobuf, and what grpcio requires."""

LOAD_ENTRY_POINTS = """
import sys
from importlib.metadata import distributions
loaded = [
    f"{point.group}: {point.name} {callable(point.load())}"
    for distribution in distributions(path=[sys.path[1]])
    for point in distribution.entry_points
]
print("\\n".join(sorted(loaded)))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The wheel of each part, built without a network from a copy of the files git knows."""
    sources = tmp_path_factory.mktemp("sources")
    built = tmp_path_factory.mktemp("wheels")
    for path in files():
        if path.parts[0] in PARTS:
            (sources / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, sources / path)
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    done = subprocess.run(
        [*command, "--no-index", "--wheel-dir", built, *(f"./{part}" for part in PARTS)],
        cwd=sources,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {part: next(built.glob(f"tokenloom_{part}-*.whl")) for part in PARTS}


def unpack(wheels: Mapping[str, Path], *parts: str, into: Path) -> Path:
    """Unpacks the wheels of some parts over each other, as pip would install them."""
    for part in parts:
        with ZipFile(wheels[part]) as wheel:
            wheel.extractall(into)
    return into


@pytest.mark.parametrize("part", PARTS)
def test_wheel_holds_every_file_of_its_part_and_nothing_else(
    part: str, wheels: Mapping[str, Path]
) -> None:
    with ZipFile(wheels[part]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = Path(part, "tokenloom")
    known = {str(path.relative_to(part)) for path in files() if path.is_relative_to(package)}
    assert packed == known


@pytest.mark.parametrize("part", PARTS)
def test_wheel_tells_type_checkers_that_it_is_typed(part: str, wheels: Mapping[str, Path]) -> None:
    with ZipFile(wheels[part]) as wheel:
        names = wheel.namelist()
    packages = {"/".join(name.split("/")[:2]) for name in names if name.startswith("tokenloom/")}
    assert packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)


def test_four_wheels_make_one_namespace(wheels: Mapping[str, Path], tmp_path: Path) -> None:
    installed = unpack(wheels, *PARTS, into=tmp_path)
    packages = "tokenloom.v1,tokenloom.wire,tokenloom.scheduler,tokenloom.worker,tokenloom.client"
    optional = "flash_attn,bitsandbytes,triton"
    printed = run_python(
        IMPORT_ALL, packages, optional, path=(installed, SITE_PACKAGES), site=False
    )
    assert set(packages.split(",")) <= set(json.loads(printed.splitlines()[-1]))


def test_entry_points_of_the_wheels_load(wheels: Mapping[str, Path], tmp_path: Path) -> None:
    installed = unpack(wheels, *PARTS, into=tmp_path)
    printed = run_python(LOAD_ENTRY_POINTS, path=(installed, SITE_PACKAGES), site=False)
    assert printed.splitlines() == [
        "console_scripts: tokenloom True",
        "tokenloom.commands: bearer-token True",
        "tokenloom.commands: keys True",
        "tokenloom.commands: plan True",
        "tokenloom.commands: quantize True",
        "tokenloom.commands: scheduler True",
        "tokenloom.commands: serve True",
        "tokenloom.commands: worker True",
    ]


def test_client_runs_with_grpcio_and_protobuf_alone(
    wheels: Mapping[str, Path], tmp_path: Path
) -> None:
    installed = unpack(wheels, "client", "protos", into=tmp_path / "installed")
    shutil.rmtree(installed / "tokenloom/wire")  # its extra, msgspec, is not installed
    needs = tmp_path / "needs"
    for name in SDK_NEEDS:
        (needs / name).parent.mkdir(parents=True, exist_ok=True)
        (needs / name).symlink_to(SITE_PACKAGES / name)
    printed = run_python(IMPORT_ALL, "tokenloom.client", "", path=(installed, needs), site=False)
    loaded = json.loads(printed.splitlines()[-1])
    assert "tokenloom.v1.inference_pb2_grpc" in loaded
    printed = run_python(
        "from tokenloom.client.cli import main; main(['--help'])",
        path=(installed, needs),
        site=False,
    )
    assert "generate" in printed
