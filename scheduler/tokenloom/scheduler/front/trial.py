"""A chat template's first run, in a process that may take little: it is the checkpoint's program.

A template that builds a gigabyte, or loops for hours, does it here and not in a front.
`python -m tokenloom.scheduler.front.trial` is that process; its standard input says what to try.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache

from tokenloom.scheduler.front.chat import ChatTemplate, TemplateError

_CPU_S = 2
_MEMORY_BYTES = 1024 * 1024 * 1024
_WALL_S = 30.0
"""On a host that has little time for it."""
_CHATS = (
    (("user", "Hello"),),
    (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Bye")),
)


def try_template(source: str, special_tokens: Mapping[str, str]) -> None:
    """Raises TemplateError if a template takes too much to compile or to render.

    One that refuses the chats, or does not compile, takes little.
    """
    _try(json.dumps({"source": source, "special_tokens": dict(special_tokens)}))


@lru_cache(maxsize=8)
def _try(given: str) -> None:
    command = [sys.executable, "-m", "tokenloom.scheduler.front.trial"]
    try:
        done = subprocess.run(
            command, input=given, text=True, capture_output=True, timeout=_WALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        code: int | str = "no end"
    else:
        if done.returncode == 0:
            return
        code = done.returncode
    raise TemplateError(
        f"the chat template takes more than {_CPU_S} s or {_MEMORY_BYTES >> 20} MiB for a short "
        f"chat, and is not run any further (its trial ended with {code})"
    )


def main() -> int:
    """Compiles and renders what standard input says; returns the exit code."""
    given = json.loads(sys.stdin.read())
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        template = ChatTemplate(given["source"], given["special_tokens"])
    except TemplateError:
        return 0
    for chat in _CHATS:
        try:
            template.render(chat)
        except TemplateError as error:
            if isinstance(error.__cause__, MemoryError):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
