"""Reads a Dockerfile as far as its install steps go."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """What stands between one FROM and the next."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and its arguments, in order."""

    def arguments(self, *instructions: str) -> list[str]:
        """Returns the arguments of all steps of some kinds."""
        return [rest for instruction, rest in self.steps if instruction in instructions]


def read_stages(path: Path) -> dict[str, Stage]:
    """Returns the stages of a Dockerfile by name."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.split()
            stage = stages[name] = Stage(name, base)
        elif stage is not None and instruction:
            stage.steps.append((instruction, " ".join(rest.split())))
    return stages


def copied(rest: str) -> tuple[list[str], str]:
    """Returns sources and destination of a COPY from the build context."""
    *sources, destination = shlex.split(rest)
    return sources, destination
