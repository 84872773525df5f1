"""The checkpoint's chat template, rendered in a sandbox.

A template is a program from the checkpoint; a client never sends one. It sees
what `transformers`' `apply_chat_template(add_generation_prompt=True)` shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateError(ValueError):
    """The template refuses the messages, or cannot be rendered or compiled."""


class PromptTooLong(ValueError):
    """A prompt is longer than can be served; how long is not worth finding out."""


class ChatTemplate:
    """A compiled chat template. Raises TemplateError if the source does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not compile: {error}") from error

    def render(self, messages: Sequence[tuple[str, str]], *, max_chars: int | None = None) -> str:
        """Returns the prompt of (role, content) messages.

        Raises TemplateError, or PromptTooLong as soon as there are more than `max_chars`.
        """
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                messages=[{"role": role, "content": content} for role, content in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if max_chars is not None and num_chars > max_chars:
                    break
        except Exception as error:  # a template runs any expression over the client's text
            raise TemplateError(str(error)) from error
        if max_chars is not None and num_chars > max_chars:
            raise PromptTooLong(
                f"becomes more than {max_chars} characters by the chat template; "
                f"this server accepts {max_chars}"
            )
        return "".join(pieces)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates call it so
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002 - templates call it so
) -> str:
    """Jinja's own filter escapes for HTML; templates expect plain JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def find_template(
    read: Callable[[str], str | None], tokenizer_config: Mapping[str, object]
) -> str | None:
    """Returns the source of the checkpoint's default chat template, or None.

    `read` returns the text of a file of the checkpoint. A file of its own
    counts before the entry in tokenizer_config.json, which is a string or a
    list of named templates.
    """
    source = read("chat_template.jinja")
    if source is not None:
        return source
    entry = tokenizer_config.get("chat_template")
    legacy = read("chat_template.json")
    if legacy is not None:
        try:
            entry = json.loads(legacy).get("chat_template", entry)
        except (json.JSONDecodeError, AttributeError) as error:
            raise TemplateError(f"chat_template.json holds no JSON object: {error}") from error
    if isinstance(entry, list):
        entry = {named["name"]: named["template"] for named in entry}.get("default")
    return entry if isinstance(entry, str) else None
