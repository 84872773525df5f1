"""The state of one stream, apart from how its messages arrive.

`Client` and `AsyncClient` feed it each message; it holds the promise
*Delivery*: token indices come in order, without gap or repetition, between one
Admission and one Finish, or the stream fails with a ProtocolError.
"""

from __future__ import annotations

from tokenloom.client.errors import ProtocolError
from tokenloom.client.results import (
    FINISH_REASONS,
    Admission,
    Delta,
    FinishReason,
    Pause,
    Result,
    TokenLogprob,
    read_admission,
    read_cost,
    read_delta,
    read_pause,
    read_usage,
)
from tokenloom.v1 import inference_pb2 as pb


class Completion:
    """What has come of one completion so far."""

    def __init__(self) -> None:
        self.admission: Admission | None = None
        self.token_ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: pb.Finish | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def feed(self, message: pb.GenerateResponse) -> Delta | Pause | None:
        """Takes the next message; returns it if callers may see it. Raises ProtocolError."""
        if self._finish is not None:
            raise ProtocolError("a message came after the finish message")
        match message.WhichOneof("event"):
            case "admission":
                self._admit(message.admission)
            case "delta":
                return self._append(message.delta)
            case "pause":
                return read_pause(message.pause)
            case "finish":
                self._require_admission("the finish message")
                self._finish = message.finish
            case None:
                pass  # an event that a newer server knows; it says nothing about tokens
        return None

    def result(self) -> Result:
        """Returns the whole completion, once the stream has ended. Raises ProtocolError."""
        if self._finish is None or self.admission is None:
            raise ProtocolError(
                f"the stream ended without a finish message, after {len(self.token_ids)} tokens"
            )
        finish = self._finish
        return Result(
            text=self.text,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self._logprobs),
            finish_reason=FINISH_REASONS.get(finish.reason, FinishReason.OTHER),
            stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
            stop_string=finish.stop_string if finish.HasField("stop_string") else None,
            usage=read_usage(finish.usage),
            request_id=self.admission.request_id,
            seed=self.admission.seed,
            cost=read_cost(finish.cost) if finish.HasField("cost") else None,
        )

    def _admit(self, message: pb.Admission) -> None:
        if self.admission is not None:
            raise ProtocolError("a second admission message came")
        self.admission = read_admission(message)

    def _append(self, message: pb.Delta) -> Delta:
        self._require_admission("a delta")
        delta = read_delta(message)
        expected = len(self.token_ids)
        if delta.token_ids and delta.first_index != expected:
            raise ProtocolError(f"a delta begins at token {delta.first_index}; expected {expected}")
        if delta.logprobs and len(delta.logprobs) != len(delta.token_ids):
            raise ProtocolError(
                f"a delta has {len(delta.logprobs)} logprobs for {len(delta.token_ids)} tokens"
            )
        self.token_ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)
        self._text.append(delta.text)
        return delta

    def _require_admission(self, what: str) -> None:
        if self.admission is None:
            raise ProtocolError(f"{what} came before the admission message")
