"""A completion that goes on: its text from the tokens that the client already has.

    token ids      t0 t1 t2 t3 │ t4 …            from another stream │ from this one
    text           delivered  │ rest │ held …    the rest goes with the first delta; what may still
                                                 become a stop string or a character is held, as
                                                 it was held there

Text is a function of the tokens alone, so whoever has the same tokenizer holds the same. Only how
much of it was delivered depends on how the deltas fell, so the client tells that.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from tokenloom.scheduler.front.detokenize import Detokenizer
from tokenloom.scheduler.front.errors import InvalidRequest, Violation
from tokenloom.scheduler.front.stops import StopScanner
from tokenloom.scheduler.front.validate import Beginning
from tokenloom.scheduler.messages import FinishReason


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Where a completion stands after its beginning."""

    rest: str
    """Text that is final and was not delivered."""
    stop_string: str | None
    stop_token_id: int | None
    reason: FinishReason | None
    """Why it ends here; None: it goes on."""


def replay(
    beginning: Beginning,
    *,
    detokenizer: Detokenizer,
    scanner: StopScanner | None,
    stop_token_ids: AbstractSet[int],
    min_tokens: int,
    max_tokens: int,
) -> Replay:
    """Takes detokenizer and scanner through a beginning.

    Raises InvalidRequest if no stream of this request can have brought it.
    """
    ids = beginning.token_ids.tolist()
    text: list[str] = []
    stop_string: str | None = None
    stop_token_id: int | None = None

    def scan(piece: str, num_tokens: int) -> str | None:
        if scanner is None:
            text.append(piece)
            return None
        final, match = scanner.feed(piece, may_stop=num_tokens >= min_tokens)
        text.append(final)
        return match

    for num_tokens, token in enumerate(ids, 1):
        if token not in stop_token_ids:
            stop_string = scan(detokenizer.feed((token,)), num_tokens)
        elif num_tokens > min_tokens:
            stop_token_id = token
        else:
            raise _refusal(
                "token_ids",
                f"holds the stop token {token} at index {num_tokens - 1}; "
                f"min_tokens is {min_tokens}",
            )
        if num_tokens < len(ids) and (stop_string, stop_token_id) != (None, None):
            raise _refusal(
                "token_ids",
                f"has {len(ids)} tokens; with token {token} at index {num_tokens - 1} "
                "the completion ended",
            )

    reason: FinishReason | None = None
    if stop_string is not None:
        reason = FinishReason.STOP_STRING
    elif stop_token_id is not None:
        reason = FinishReason.STOP_TOKEN
    elif len(ids) == max_tokens:
        reason = FinishReason.LENGTH
    if reason is not None and stop_string is None:  # as at the end of any stream
        stop_string = scan(detokenizer.flush(), len(ids))
        text.append("" if scanner is None else scanner.flush())
    return Replay(
        rest=_rest("".join(text).encode(), beginning.num_text_bytes),
        stop_string=stop_string,
        stop_token_id=stop_token_id,
        reason=reason,
    )


def _rest(text: bytes, num_delivered_bytes: int) -> str:
    """Returns what follows the delivered text."""
    if num_delivered_bytes > len(text):
        raise _refusal(
            "num_text_bytes",
            f"is {num_delivered_bytes}; the text of token_ids has {len(text)} bytes",
        )
    try:
        return text[num_delivered_bytes:].decode()
    except UnicodeDecodeError as error:
        raise _refusal(
            "num_text_bytes", f"is {num_delivered_bytes}, which is inside a character"
        ) from error


def _refusal(field: str, description: str) -> InvalidRequest:
    return InvalidRequest([Violation(field=f"resume_from.{field}", description=description)])
