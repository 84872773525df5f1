from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.repository import PARTS, ROOT, project


def requirements(part: str) -> list[Requirement]:
    """Returns what a part requires, extras included."""
    table = project(part)
    optional = table.get("optional-dependencies", {})
    lines = [
        *table.get("dependencies", ()),
        *(line for extra in optional.values() for line in extra),
    ]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    """Returns the version of each package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pairs}


def test_parts_have_one_version() -> None:
    assert len({project(part)["version"] for part in PARTS}) == 1


def test_parts_require_each_other_in_their_own_version() -> None:
    for part in PARTS:
        version = project(part)["version"]
        among = [each for each in requirements(part) if each.name.startswith("tokenloom-")]
        assert [str(each.specifier) for each in among] == [f"=={version}"] * len(among)


def test_parts_require_only_what_the_dependency_table_allows() -> None:
    siblings = {
        part: {each.name for each in requirements(part) if each.name.startswith("tokenloom-")}
        for part in PARTS
    }
    assert siblings == {
        "protos": set(),
        "scheduler": {"tokenloom-protos"},
        "worker": {"tokenloom-protos"},
        "client": {"tokenloom-protos"},
    }
    assert "torch" not in {each.name for each in requirements("scheduler")}
    assert "grpcio" not in {each.name for each in requirements("worker")}


def test_every_requirement_is_a_range_that_the_pinned_version_satisfies() -> None:
    pinned = pins()
    for part in PARTS:
        for requirement in requirements(part):
            name = canonicalize_name(requirement.name)
            # An extra for GPU hosts pins its package itself; `make` does not install it.
            exact = str(requirement.specifier).startswith("==")
            if not exact:
                assert name in pinned, f"{part} requires {name}, which constraints.txt does not pin"
                assert requirement.specifier.contains(pinned[name]), f"{requirement} {pinned[name]}"


def test_every_development_requirement_is_pinned() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    stated = (line.partition("#")[0].strip() for line in lines)
    names = [Requirement(each).name for each in stated if each]
    assert [name for name in names if canonicalize_name(name) not in pins()] == []
