"""The options of commands, as their help has them and as manifests give them."""

import re
from collections.abc import Callable, Sequence

import pytest

_OPTION = re.compile(r"--[a-z0-9-]+")


def options_of(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Returns the options that a command has."""
    with pytest.raises(SystemExit):
        command(["--help"])
    return set(_OPTION.findall(capsys.readouterr().out))


def given_options(arguments: Sequence[str]) -> set[str]:
    """Returns the options among arguments, without their values."""
    return {found[0] for each in arguments if (found := _OPTION.match(each))}
