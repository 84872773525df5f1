"""The `tokenloom` command.

`generate`, `chat`, `bench`, `top`, `health` and those of `operating.py` are its own. Every other
command comes from a part that is installed beside the client and names it as an entry point of
the group `tokenloom.commands`: a callable that takes the rest of the command line and returns
the exit status. Statuses: 0 done, 1 the call failed, 2 the command line
is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from tokenloom.client import operating
from tokenloom.client.chat import ChatSession, describe, interrupt_cancels
from tokenloom.client.client import Client, Stream
from tokenloom.client.errors import Cancelled, TokenloomError
from tokenloom.client.flags import access_of, add_access_options
from tokenloom.client.grpc_transport import GrpcTransport
from tokenloom.client.health import health
from tokenloom.client.requests import Message, Options

_GROUP = "tokenloom.commands"
_DEFAULT_TARGET = "localhost:50051"
_KNOWN = {
    "serve": ("scheduler", "python -m tokenloom.scheduler serve"),
    "scheduler": ("scheduler", "python -m tokenloom.scheduler scheduler"),
    "keys": ("scheduler", "python -m tokenloom.scheduler keys"),
    "bearer-token": ("scheduler", "python -m tokenloom.scheduler bearer-token"),
    "worker": ("worker", "python -m tokenloom.worker"),
    "plan": ("worker", "python -m tokenloom.worker.plan"),
    "quantize": ("worker", "python -m tokenloom.worker.saving"),
}
"""Commands of other parts: the part, and how to run it where nothing can be installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own: dict[str, Callable[[list[str]], int]] = {
        "generate": generate,
        "chat": chat,
        "bench": bench,
        "top": top,
        "health": health,
        **operating.COMMANDS,
    }
    if not arguments:
        print(_overview(), file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name in own:
        return own[name](rest)
    found = _installed_commands().get(name)
    if found is not None:
        return int(found.load()(rest))
    print(f"tokenloom: {_missing(name)}", file=sys.stderr)
    return 2


def generate(argv: list[str]) -> int:
    """`tokenloom generate PROMPT`: completes a prompt and prints the text as it comes."""
    parser = _parser("generate", "Completes a prompt and prints the text as it comes.")
    parser.add_argument("prompt", help="the text to complete; - reads it from standard input")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="send the prompt as a user's message, in the form of the model's chat template",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the whole result as one JSON object at the end"
    )
    _add_options(parser)
    args = parser.parse_args(argv)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    try:
        with _client(args) as client:
            options = _options(args)
            if args.chat:
                messages = [Message("user", prompt)]
                stream = client.chat(messages, timeout_s=args.timeout_s, **options)
            else:
                stream = client.generate(prompt, timeout_s=args.timeout_s, **options)
            with stream, interrupt_cancels(stream):
                _print_stream(stream, as_json=args.json)
    except TokenloomError as error:
        if isinstance(error, Cancelled) and not error.reason:  # it was not the server
            return 128 + signal.SIGINT
        print(f"tokenloom: {describe(error, args.target)}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Who reads the output has seen enough; the interpreter flushes once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def chat(argv: list[str]) -> int:
    """`tokenloom chat`: an interactive chat with the served model."""
    parser = _parser(
        "chat",
        "Chats with the served model. Ctrl-C cancels an answer, Ctrl-D leaves, /help tells more.",
    )
    parser.add_argument("--system", help="a system message that opens the chat (default: none)")
    _add_options(parser)
    args = parser.parse_args(argv)
    try:
        with _client(args) as client:
            session = ChatSession(
                client,
                target=args.target,
                options=_options(args),
                timeout_s=args.timeout_s,
                system=args.system,
            )
            return session.run()
    except TokenloomError as error:
        print(f"tokenloom: {describe(error, args.target)}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(str(error))


def bench(argv: list[str]) -> int:
    """`tokenloom bench`: loads a server and reports what its clients see."""
    from tokenloom.client.bench.cli import main as run

    return run(argv)


def top(argv: list[str]) -> int:
    """`tokenloom top TARGET…`: what replicas are busy with, live."""
    from tokenloom.client.top.cli import main as run

    return run(argv)


def _client(args: argparse.Namespace) -> Client:
    """Returns a client of the target. Raises ValueError."""
    return Client(GrpcTransport(args.target, access=access_of(args)))


def _print_stream(stream: Stream, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(stream.result()), ensure_ascii=False))
        return
    try:
        for delta in stream:
            print(delta.text, end="", flush=True)
    finally:
        if stream.partial_text:
            # What comes next on the terminal begins on a line of its own.
            print(flush=True)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults; an option that tells its default itself is left as it is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"tokenloom {name}", description=description, formatter_class=_HelpFormatter
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        default=_DEFAULT_TARGET,
        help="address of the server as gRPC writes it: host:port, unix:/path, dns:///name:port",
    )
    parser.add_argument(
        "--timeout-s", type=float, help="seconds an answer may take (default: no limit)"
    )
    add_access_options(parser)
    group = parser.add_argument_group(
        "how to answer", "an option that is left out is not sent; the server's default applies"
    )
    for name, kind, text in (
        ("max_tokens", int, "the most tokens to complete (default: what the context allows)"),
        ("min_tokens", int, "before this many tokens no stop applies (default: 0)"),
        ("temperature", float, "0 takes the likeliest token each time (default: 1)"),
        ("top_p", float, "keep the likeliest tokens that reach this probability (default: 1)"),
        ("top_k", int, "keep this many of the likeliest tokens; 0 keeps all (default: 0)"),
        ("min_p", float, "keep tokens this many times as likely as the likeliest (default: 0)"),
        ("presence_penalty", float, "against tokens that occurred (default: 0)"),
        ("frequency_penalty", float, "against tokens, for each occurrence (default: 0)"),
        ("repetition_penalty", float, "against tokens of prompt and completion (default: 1)"),
        ("seed", int, "the same seed draws the same tokens (default: the server chooses)"),
        ("priority", int, "larger ones go first among the caller's own (default: 0)"),
        ("num_top_logprobs", int, "with --json: log probabilities, of so many (default: none)"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,
            metavar="N" if kind is int else "X",
            help=text,
        )
    group.add_argument(
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="end before this text; may be given several times (default: none)",
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=argparse.SUPPRESS,
        help="do not end at the model's own end-of-sequence tokens (default: end there)",
    )


def _options(args: argparse.Namespace) -> Options:
    """Returns the options that were given; argparse leaves the others out."""
    given = {name: value for name, value in vars(args).items() if name in Options.__annotations__}
    return cast("Options", given)


def _installed_commands() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def _overview() -> str:
    lines = [
        "usage: tokenloom COMMAND …",
        "",
        "commands:",
        "  generate   complete a prompt and print the text as it comes",
        "  chat       chat with the served model",
        "  bench      load a server and report what its clients see",
        "  top        watch what replicas are busy with",
        "  health     ask a server whether it serves, for probes",
        "  drain      let a server finish what it has and take nothing new",
        "  abort      end one request",
        "  profile    record what the workers do in the next steps",
    ]
    installed = _installed_commands()
    for name, entry in sorted(installed.items()):
        origin = entry.dist.name if entry.dist is not None else entry.module
        lines.append(f"  {name:<10} from {origin}")
    absent = sorted(name for name in _KNOWN if name not in installed)
    if absent:
        lines += ["", f"not installed here: {', '.join(absent)}"]
    lines += ["", "`tokenloom COMMAND --help` tells the options of a command."]
    return "\n".join(lines)


def _missing(name: str) -> str:
    """Returns what to do about a command that is not there."""
    if name not in _KNOWN:
        own = ("generate", "chat", "bench", "top", "health", *operating.COMMANDS)
        known = ", ".join(sorted({*own, *_KNOWN, *_installed_commands()}))
        return f"there is no command {name!r}; there are {known}"
    part, command = _KNOWN[name]
    if importlib.util.find_spec(f"tokenloom.{part}") is not None:
        return f"tokenloom-{part} is on the path but not installed; run `{command}`"
    return f"`{name}` comes with another package; `pip install tokenloom-{part}`"
