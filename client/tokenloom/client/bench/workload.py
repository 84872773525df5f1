"""Which requests a load is made of.

A source is a pure function from an index to a request, so every process draws its own share
and none has to be told what the others send.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

_CASE_VOCAB_SIZE = 100_000

Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids."""


class WorkloadError(ValueError):
    """A workload that cannot be made; the message says which part of it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, and the most tokens to complete; None leaves that to the server."""

    prompt: Prompt
    max_tokens: int | None


@dataclass(frozen=True)
class Lengths:
    """Whole numbers of tokens, uniform from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Returns the lengths that `N` or `A:B` means. Raises WorkloadError."""
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high) if colon else int(low))
        except ValueError:
            raise WorkloadError(f"{text!r} is neither a number of tokens nor a range A:B") from None
        if not 1 <= lengths.low <= lengths.high:
            raise WorkloadError(f"lengths are {text}; they start at 1 and go upwards")
        return lengths

    def draw(self, draws: random.Random) -> int:
        """Returns one of the lengths; a single one takes nothing from the draws."""
        return self.low if self.low == self.high else draws.randint(self.low, self.high)


class Source(Protocol):
    """Gives the request of an index, the same in each process."""

    def request(self, index: int) -> Request:
        """Returns a request; indices start at 0 and have no end."""


@dataclass(frozen=True)
class Listed:
    """Requests that are known one by one; after the last comes the first again."""

    requests: tuple[Request, ...]

    def request(self, index: int) -> Request:
        """Returns the request at an index, counted around."""
        return self.requests[index % len(self.requests)]


@dataclass(frozen=True, kw_only=True)
class Endless:
    """Random token ids; no two requests share a prefix but by chance."""

    prompt_tokens: Lengths
    output_tokens: Lengths
    vocab_size: int
    seed: int

    def request(self, index: int) -> Request:
        """Draws the request of an index."""
        draws = random.Random(f"{self.seed}/{index}")
        num_prompt_tokens = self.prompt_tokens.draw(draws)
        num_output_tokens = self.output_tokens.draw(draws)
        ids = draws.choices(range(self.vocab_size), k=num_prompt_tokens)
        return Request(prompt=array("I", ids), max_tokens=num_output_tokens)


def random_requests(
    num_requests: int,
    *,
    prompt_tokens: Lengths,
    output_tokens: Lengths,
    vocab_size: int,
    seed: int,
) -> Listed:
    """Draws requests of random token ids.

    One generator draws it all: for each prompt its length and its ids, then the lengths of
    the outputs. Published comparisons rest on this order; it must stay.
    """
    draws = random.Random(seed)
    prompts = [
        array("I", [draws.randrange(vocab_size) for _ in range(prompt_tokens.draw(draws))])
        for _ in range(num_requests)
    ]
    return Listed(
        tuple(Request(prompt=prompt, max_tokens=output_tokens.draw(draws)) for prompt in prompts)
    )


@dataclass(frozen=True)
class Case:
    """A named workload, the same for every system that is compared."""

    num_requests: int
    prompt_tokens: Lengths
    output_tokens: Lengths
    seed: int = 11

    def requests(self, vocab_size: int | None = None) -> Listed:
        """Returns the case's requests, with ids below 100,000 unless said otherwise."""
        return random_requests(
            self.num_requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            vocab_size=vocab_size or _CASE_VOCAB_SIZE,
            seed=self.seed,
        )


def _fixed(num_requests: int, num_prompt_tokens: int, num_output_tokens: int) -> Case:
    return Case(
        num_requests,
        Lengths(num_prompt_tokens, num_prompt_tokens),
        Lengths(num_output_tokens, num_output_tokens),
    )


CASES = {
    "mixed256": Case(256, Lengths(100, 1024), Lengths(100, 1024), seed=7),
    "b1": _fixed(1, 1024, 256),
    "b32": _fixed(32, 1024, 256),
    "b128": _fixed(128, 512, 256),
    "prefill": _fixed(16, 8192, 1),
    "long1": _fixed(1, 32768, 64),
}


def read_requests(path: Path, *, max_tokens: int | None) -> Listed:
    """Reads requests, a line of JSON each; `max_tokens` is for lines that have none.

    A line is a string, a list of token ids, or an object with `text` or `token_ids` (or
    `prompt`, which may be either) and perhaps `max_tokens`. Raises WorkloadError, OSError.
    """
    requests = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    requests.append(_parse_line(line, max_tokens))
                except ValueError as error:
                    raise WorkloadError(f"{path}:{number}: {error}") from None
    if not requests:
        raise WorkloadError(f"{path} has no requests")
    return Listed(tuple(requests))


def _parse_line(line: str, max_tokens: int | None) -> Request:
    value = json.loads(line)
    fields = value if isinstance(value, dict) else {"prompt": value}
    prompts = [fields[name] for name in ("prompt", "text", "token_ids") if name in fields]
    limit = fields.get("max_tokens", max_tokens)
    if limit is not None and not (isinstance(limit, int) and limit >= 1):
        raise WorkloadError(f"max_tokens is {limit!r}; it is a number from 1 up")
    match prompts:
        case [str() as text]:
            return Request(prompt=text, max_tokens=limit)
        case [[_, *_] as ids] if all(type(each) is int and 0 <= each < 1 << 32 for each in ids):
            return Request(prompt=array("I", ids), max_tokens=limit)
        case _:
            raise WorkloadError("needs one prompt: a text or a list of token ids")
