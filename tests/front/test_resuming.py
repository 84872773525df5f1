"""A completion that broke off goes on as if nothing had happened, and nobody can lie about it."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.front.checkpoints import byte_fallback_tokenizer, byte_level_tokenizer
from tests.front.fake_core import READY
from tests.front.harness import Completion, Front, Refusal, refusal_of
from tokenloom.scheduler.front.detokenize import DetokenizerFactory
from tokenloom.scheduler.front.stops import StopScanner, stop_strings
from tokenloom.scheduler.front.streams import Piece, Stream
from tokenloom.scheduler.front.validate import Beginning
from tokenloom.scheduler.messages import Finished, FinishReason
from tokenloom.v1 import inference_pb2 as pb

BYTE_LEVEL = byte_level_tokenizer()
FACTORIES = [DetokenizerFactory(BYTE_LEVEL), DetokenizerFactory(byte_fallback_tokenizer())]
NUM_IDS = 270
"""Ids that both tokenizers have."""
STOP_TOKEN = 269


def stream_of(factory: DetokenizerFactory, stops: tuple[str, ...], min_tokens: int) -> Stream:
    return Stream(
        number=1,
        detokenizer=factory.new(skip_special_tokens=True),
        scanner=StopScanner(stop_strings(stops)) if stops else None,
        min_tokens=min_tokens,
        stop_token_ids=frozenset({STOP_TOKEN}),
        max_buffer_tokens=1000,
        on_stop=lambda *_: None,
    )


class Run:
    """What a client has of a completion, from one stream or from two."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.end: tuple[FinishReason, int | None, str | None, int] | None = None

    def take(self, stream: Stream) -> None:
        piece = stream.take()
        assert piece.first_index == len(self.ids)
        self.ids += piece.token_ids
        self.text += piece.text
        self._note_end(piece)

    def _note_end(self, piece: Piece) -> None:
        if piece.end is not None:
            finished = piece.end.finished
            self.end = (
                finished.reason,
                finished.stop_token_id,
                piece.end.stop_string,
                finished.num_completion_tokens,
            )

    def push(self, stream: Stream, ids: Sequence[int], max_tokens: int, cuts: set[int]) -> None:
        """Brings ids as the core does, up to max_tokens; the client reads at the cuts."""
        stream.admit(0)
        num_tokens = len(self.ids)
        reason = FinishReason.LENGTH
        for token in ids:
            stream.push(token, None)
            num_tokens += 1
            if token == STOP_TOKEN:
                reason = FinishReason.STOP_TOKEN
                break
            if num_tokens == max_tokens:
                break
            if num_tokens in cuts:
                self.take(stream)
        else:
            return
        stream.finish(
            Finished(
                stream=1,
                reason=reason,
                stop_token_id=STOP_TOKEN if reason is FinishReason.STOP_TOKEN else None,
                num_completion_tokens=num_tokens,
                queue_s=None,
                prefill_s=None,
                decode_s=None,
            )
        )
        self.take(stream)


@settings(max_examples=500, deadline=None)
@given(
    factory=st.sampled_from(FACTORIES),
    ids=st.lists(st.integers(0, NUM_IDS - 1) | st.sampled_from([100, 200]), min_size=1),
    stops=st.sampled_from([(), ("a",), ("ab", "b"), ("Āa", "dd", "é")]),
    min_tokens=st.integers(0, 3),
    num_read=st.integers(0, 30),
    cuts=st.sets(st.integers(0, 30)),
)
def test_a_stream_in_two_parts_is_the_whole_stream(
    factory: DetokenizerFactory,
    ids: list[int],
    stops: tuple[str, ...],
    min_tokens: int,
    num_read: int,
    cuts: set[int],
) -> None:
    """Wherever it breaks, also behind its last token, and however deltas fall before and after."""
    early = [5 if token == STOP_TOKEN else token for token in ids[:min_tokens]]
    ids = early + ids[min_tokens:]
    whole = Run()
    whole.push(stream_of(factory, stops, min_tokens), ids, len(ids), set())

    parts = Run()
    first = stream_of(factory, stops, min_tokens)
    parts.push(first, ids[: min(num_read, len(ids))], len(ids), cuts)
    parts.end = None  # if it came, the Finish was lost
    second = stream_of(factory, stops, min_tokens)
    beginning = Beginning(
        fingerprint="",
        token_ids=np.array(parts.ids, np.int32),
        num_text_bytes=len(parts.text.encode()),
    )
    second.resume(beginning, max_tokens=len(ids))
    if second.is_over:
        parts.take(second)
    else:
        parts.push(second, ids[len(parts.ids) :], len(ids), cuts)
    assert (parts.ids, parts.text, parts.end) == (whole.ids, whole.text, whole.end)


# Through gRPC --------------------------------------------------------------------------------


def resumed(
    request: pb.GenerateRequest, admission: pb.Admission, ids: Sequence[int], text: str = ""
) -> pb.GenerateRequest:
    """Returns the request that goes on with a completion, as protocol.md describes it."""
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    again.sampling.seed = admission.seed
    again.stopping.max_tokens = admission.max_tokens
    again.resume_from.fingerprint = admission.fingerprint
    again.resume_from.token_ids.extend(ids)
    again.resume_from.num_text_bytes = len(text.encode())
    return again


async def complete(front: Front, request: pb.GenerateRequest) -> Completion:
    completion = Completion()
    async for response in front.stub.Generate(request):
        completion.take(response)
    return completion


class Continued(Completion):
    """A stream whose first token has an index."""

    num_before = 0

    @property
    def token_ids(self) -> list[int]:
        return [0] * self.num_before + super().token_ids


async def go_on(front: Front, request: pb.GenerateRequest) -> Continued:
    continued = Continued()
    continued.num_before = len(request.resume_from.token_ids)
    async for response in front.stub.Generate(request):
        continued.take(response)  # which checks the first index
    return continued


async def refused(front: Front, request: pb.GenerateRequest) -> Refusal:
    num_submits = len(front.core.submits)
    refusal = await refusal_of(front.stub.Generate(request))
    assert len(front.core.submits) == num_submits
    return refusal


@pytest.mark.parametrize("num_before", [0, 1, 7, 19])
async def test_what_goes_on_brings_the_rest_and_counts_all(front: Front, num_before: int) -> None:
    request = front.request("The quick brown fox", max_tokens=20, num_top_logprobs=1)
    whole = await complete(front, request)
    ids = whole.token_ids[:num_before]
    text = await front.text.decode(ids, skip_special_tokens=True)
    rest = await go_on(front, resumed(request, whole.admission, ids, text))
    assert rest.token_ids[num_before:] == whole.token_ids[num_before:]
    assert text + rest.text == whole.text
    assert sum(len(delta.logprobs) for delta in rest.deltas) == 20 - num_before
    assert rest.finish is not None
    assert whole.finish is not None
    assert rest.finish.usage.num_prompt_tokens == whole.finish.usage.num_prompt_tokens
    assert rest.finish.usage.num_completion_tokens == 20
    first, second = front.core.submits
    assert second.num_completion_tokens == num_before
    assert second.tokens == first.tokens + np.array(ids, "<i4").tobytes()
    assert second.sampling == first.sampling
    assert second.max_tokens == first.max_tokens
    assert rest.admission.fingerprint == whole.admission.fingerprint
    assert rest.admission.request_id != whole.admission.request_id


async def test_a_resolved_length_and_seed_are_told_and_kept(front: Front) -> None:
    request = front.request([300] * 200)
    whole = await complete(front, request)
    assert whole.admission.max_tokens == READY.max_model_tokens - 200
    await go_on(front, resumed(request, whole.admission, whole.token_ids[:5]))
    assert front.core.submits[0].sampling == front.core.submits[1].sampling


async def test_a_stop_string_is_found_across_the_seam(front: Front) -> None:
    ids = (await front.text.encode("The quick brown fox jumps")).tolist()
    front.core.script = lambda _: ids
    request = front.request("x", stop_strings=["quick brown"], max_tokens=50)
    whole = await complete(front, request)
    num_before = len((await front.text.encode("The quick")).tolist())
    assert num_before < len(whole.token_ids)
    rest = await go_on(front, resumed(request, whole.admission, ids[:num_before], "The "))
    assert rest.finish is not None
    assert (rest.text, rest.finish.stop_string) == ("", "quick brown")
    assert rest.finish.usage.num_completion_tokens == len(whole.token_ids)


async def test_what_lacks_only_its_finish_gets_it_without_the_core(front: Front) -> None:
    ids = (await front.text.encode("fox fo")).tolist()
    eos = front.text.eos_token_ids[0]
    front.core.stop_tokens = True
    front.core.script = lambda _: [*ids, eos]
    request = front.request("x", stop_strings=["foxes"], max_tokens=50)
    whole = await complete(front, request)
    rest = await go_on(front, resumed(request, whole.admission, whole.token_ids, "fox "))
    assert rest.text == "fo"
    assert rest.finish is not None
    assert rest.finish.reason == pb.FINISH_REASON_STOP_TOKEN
    assert rest.finish.stop_token_id == eos
    assert rest.finish.usage.num_completion_tokens == len(whole.token_ids)
    assert len(front.core.submits) == 1
    assert front.core.aborts == []


async def test_a_beginning_of_another_model_or_prompt_is_refused(front: Front) -> None:
    request = front.request("The fox", max_tokens=20)
    admission = (await complete(front, request)).admission
    other = resumed(request, admission, [5])
    other.text = "The dog"
    refusal = await refused(front, other)
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.info.reason == "OTHER_MODEL"
    assert admission.fingerprint in refusal.message
    model = await front.stub.GetModel(pb.GetModelRequest())
    await front.core.lose_model()
    await front.core.load_model(msgspec.structs.replace(READY, epoch=2, fingerprint="trained on"))
    await front.wait_ready()
    refusal = await refused(front, resumed(request, admission, [5]))
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert (await front.stub.GetModel(pb.GetModelRequest())).fingerprint != model.fingerprint


async def test_a_beginning_that_no_stream_brought_never_reaches_the_core(front: Front) -> None:
    eos = front.text.eos_token_ids[0]
    fox = (await front.text.encode("fox")).tolist()
    request = front.request(
        "The fox", max_tokens=20, min_tokens=2, stop_token_ids=[7], stop_strings=["dog"]
    )
    admission = (await complete(front, request)).admission
    dog = (await front.text.encode("dog")).tolist()

    def again(*ids: int, text: str = "") -> pb.GenerateRequest:
        return resumed(request, admission, ids, text)

    no_seed, no_length = again(5), again(5)
    no_seed.sampling.ClearField("seed")
    no_length.stopping.ClearField("max_tokens")
    half = (await front.text.encode("日本語")).tolist()
    inside = resumed(front.request("The fox", max_tokens=20), admission, half, "x")
    cases = {
        "too many": (again(*[5] * 21), "token_ids"),
        "far too many": (again(*[5] * 100_000), "token_ids"),
        "past the vocabulary": (again(READY.vocab_size), "token_ids"),
        "past int32": (again(2**32 - 1), "token_ids"),
        "goes on behind the end of sequence": (again(5, 5, eos, 5), "token_ids"),
        "goes on behind a stop token": (again(5, 5, 7, 5), "token_ids"),
        "a stop token before min_tokens": (again(5, 7), "token_ids"),
        "goes on behind a stop string": (again(5, 5, *dog, 5), "token_ids"),
        "more text than tokens": (again(*fox, text="fox and more"), "num_text_bytes"),
        "text that ends inside a character": (inside, "num_text_bytes"),
    }
    for name, (hostile, field) in cases.items():
        refusal = await refused(front, hostile)
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT, name
        assert refusal.fields == [f"resume_from.{field}"], name
    assert (await refused(front, no_seed)).fields == ["sampling.seed"]
    assert (await refused(front, no_length)).fields == ["stopping.max_tokens"]


async def test_a_long_beginning_is_replayed_beside_the_streams(front: Front) -> None:
    """In a thread; what follows is as for a short one."""
    long = msgspec.structs.replace(READY, epoch=2, max_model_tokens=10_000)
    await front.core.lose_model()
    await front.core.load_model(long)
    await front.wait_ready()
    ids = (await front.text.encode("The fox ")).tolist()
    front.core.script = lambda submit: (ids * 5000)[: submit.max_tokens]
    request = front.request("x", stop_strings=["never"], max_tokens=5000)
    admission = await front.stub.Generate(request).read()
    assert isinstance(admission, pb.GenerateResponse)
    begun = (ids * 5000)[:4990]
    text = await front.text.decode(begun, skip_special_tokens=True)
    rest = await go_on(front, resumed(request, admission.admission, begun, text))
    assert rest.token_ids[4990:] == (ids * 5000)[4990:5000]
