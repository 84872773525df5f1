from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.front.fake_core import READY
from tests.front.harness import Completion, Front, until
from tokenloom.v1 import inference_pb2 as pb


async def test_a_stream_is_admission_deltas_finish(front: Front) -> None:
    completion = await front.generate("The quick brown fox", max_tokens=40, seed=2**64 - 1)
    ids = (await front.text.encode("The quick brown fox")).tolist()
    assert completion.admission.seed == 2**64 - 1
    assert completion.admission.num_prompt_tokens == len(ids)
    assert completion.admission.num_cached_tokens == 3
    assert completion.token_ids == (ids * 40)[:40]
    assert completion.text == await front.text.decode(
        completion.token_ids, skip_special_tokens=True
    )
    finish = completion.finish
    assert finish is not None
    assert finish.reason == pb.FINISH_REASON_LENGTH
    assert finish.usage.num_prompt_tokens == len(ids)
    assert finish.usage.num_cached_tokens == 3
    assert finish.usage.num_completion_tokens == 40
    assert (finish.usage.queue_s, finish.usage.prefill_s) == (0.25, 0.5)
    assert not finish.usage.HasField("decode_s")  # what the core does not know is left out
    assert not finish.HasField("stop_token_id")
    assert not finish.HasField("stop_string")


async def test_the_three_forms_of_a_prompt_reach_the_core_as_tokens(front: Front) -> None:
    ids = (await front.text.encode("The fox")).tolist()
    await front.generate("The fox", max_tokens=1)
    await front.generate(ids, max_tokens=1)
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="fox")]),
        stopping=pb.Stopping(max_tokens=1),
    )
    async for _ in front.stub.Generate(request):
        pass
    text, tokens, chat = (submit.tokens for submit in front.core.submits)
    assert text == tokens
    rendered = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
    assert chat == (await front.text.encode(rendered)).tobytes()


async def test_absent_max_tokens_are_the_rest_of_the_context(front: Front) -> None:
    completion = await front.generate([300] * 200)
    assert len(completion.token_ids) == READY.max_model_tokens - 200


async def test_a_chosen_seed_is_told_and_differs(front: Front) -> None:
    seeds = {(await front.generate(max_tokens=1)).admission.seed for _ in range(4)}
    assert len(seeds) == 4
    assert {submit.sampling.seed for submit in front.core.submits} == seeds


async def test_request_ids_differ(front: Front) -> None:
    ids = {(await front.generate(max_tokens=1)).admission.request_id for _ in range(4)}
    assert len(ids) == 4


async def test_sampling_reaches_the_core(front: Front) -> None:
    await front.generate(
        max_tokens=2, temperature=0.5, top_k=7, logit_bias={4: -3.0}, num_top_logprobs=2
    )
    (submit,) = front.core.submits
    assert submit.max_tokens == 2
    assert submit.sampling.temperature == 0.5
    assert submit.sampling.top_k == 7
    assert submit.sampling.logit_bias == ((4, -3.0),)
    assert submit.sampling.num_top_logprobs == 2


async def test_each_token_has_its_logprobs_if_asked_for(front: Front) -> None:
    completion = await front.generate(max_tokens=20, num_top_logprobs=3)
    entries = [entry for delta in completion.deltas for entry in delta.logprobs]
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in completion.deltas)
    assert len(entries) == 20
    assert {entry.logprob for entry in entries} == {-0.5}
    assert [(top.token_id, top.logprob) for top in entries[0].top] == [(0, 0), (1, -1), (2, -2)]
    plain = await front.generate(max_tokens=20)
    assert not any(delta.logprobs for delta in plain.deltas)


async def test_a_stop_string_that_spans_tokens_ends_the_stream(front: Front) -> None:
    completion = await front.generate(
        "The quick brown fox jumps over the lazy dog", stop_strings=["own fox", "zzz"]
    )
    assert completion.text == "The quick br"
    finish = completion.finish
    assert finish is not None
    assert (finish.reason, finish.stop_string) == (pb.FINISH_REASON_STOP_STRING, "own fox")
    assert finish.usage.num_completion_tokens == len(completion.token_ids)
    (stop,) = front.core.stops
    assert stop.num_tokens == len(completion.token_ids)
    assert front.core.aborts == []


async def test_a_stop_token_ends_the_stream_without_its_text(front: Front) -> None:
    front.core.stop_tokens = True
    ids = (await front.text.encode("The fox")).tolist()
    completion = await front.generate([*ids, 300], stop_token_ids=[300], max_tokens=50)
    assert completion.token_ids == [*ids, 300]
    assert completion.text == "The fox"
    assert completion.finish is not None
    assert completion.finish.reason == pb.FINISH_REASON_STOP_TOKEN
    assert completion.finish.stop_token_id == 300


async def test_eos_of_the_checkpoint_is_a_stop_token_unless_ignored(front: Front) -> None:
    await front.generate(max_tokens=1)
    await front.generate(max_tokens=1, ignore_eos=True)
    stops = [submit.sampling.stop_token_ids for submit in front.core.submits]
    assert stops == [front.text.eos_token_ids, ()]
    assert len(front.text.eos_token_ids) == 1


@pytest.mark.parametrize(("skip", "text"), [(None, "fox"), (True, "fox"), (False, "<s>fox<s>")])
async def test_special_tokens_are_left_out_of_the_text_if_asked(
    front: Front, skip: bool | None, text: str
) -> None:
    ids = (await front.text.encode("<s>fox<s>")).tolist()
    settings = {} if skip is None else {"skip_special_tokens": skip}
    assert (await front.generate(ids, max_tokens=len(ids), **settings)).text == text


async def test_every_delta_has_whole_characters(front: Front) -> None:
    ids = (await front.text.encode("🎉ü日本 ")).tolist()
    completion = await front.generate(ids, max_tokens=len(ids) * 3)
    assert completion.text == "🎉ü日本 " * 3
    assert not any("\N{REPLACEMENT CHARACTER}" in delta.text for delta in completion.deltas)


async def test_many_streams_at_once_get_their_own_tokens(front: Front) -> None:
    async def one(place: int) -> Completion:
        return await front.generate([100 + place] * (1 + place % 5), max_tokens=30 + place)

    completions = await asyncio.gather(*(one(place) for place in range(64)))
    for place, completion in enumerate(completions):
        assert completion.token_ids == [100 + place] * (30 + place)
    assert front.core.num_messages < 2 * 64  # commands of one turn share a message


async def test_deltas_coalesce_while_a_write_is_pending(front: Front) -> None:
    front.core.step_s = 0.0
    completions = await asyncio.gather(*(front.generate(max_tokens=200) for _ in range(32)))
    num_deltas = sum(len(completion.deltas) for completion in completions)
    assert all(len(completion.token_ids) == 200 for completion in completions)
    assert num_deltas < 32 * 200


async def test_a_running_stream_hears_that_the_model_is_loaded_again(front: Front) -> None:
    front.core.pause_after = 3
    completion = Completion()
    pauses = []
    async for response in front.stub.Generate(front.request("The fox", max_tokens=20)):
        completion.take(response)
        if response.WhichOneof("event") == "pause":
            assert len(completion.token_ids) == 3
            pauses.append(response.pause.reason)
            await front.core.load_model()
            front.core.pause_after = None
        elif len(completion.token_ids) == 3:
            await front.core.lose_model()
    assert pauses == [pb.PAUSE_REASON_RECOVERING]
    assert len(completion.token_ids) == 20
    assert completion.finish is not None


async def test_a_request_in_the_queue_hears_nothing_of_a_lost_model(front: Front) -> None:
    front.core.is_admitting = False
    call = front.stub.Generate(front.request(max_tokens=2))
    await until(lambda: len(front.core.submits) == 1)
    await front.core.lose_model()
    while await front.is_serving():
        await asyncio.sleep(0.01)
    front.core.is_admitting = True
    events = [response.WhichOneof("event") async for response in call]
    assert events[0] == "admission"
    assert "pause" not in events


async def test_metadata_is_withheld_until_admission(front: Front) -> None:
    front.core.is_admitting = False
    call = front.stub.Generate(front.request(max_tokens=2))
    metadata = asyncio.create_task(call.initial_metadata())
    await until(lambda: len(front.core.submits) == 1)
    await asyncio.wait([metadata], timeout=0.05)
    assert not metadata.done()
    front.core.is_admitting = True
    await metadata
    events = [response.WhichOneof("event") async for response in call]
    assert events[0] == "admission"
    assert await call.code() is grpc.StatusCode.OK


async def test_tokenize_gives_the_tokens_that_generate_uses(front: Front) -> None:
    for request in (
        pb.TokenizeRequest(text="The fox 日本"),
        pb.TokenizeRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")])),
    ):
        made = pb.GenerateRequest(stopping=pb.Stopping(max_tokens=1))
        if request.HasField("text"):
            made.text = request.text
        else:
            made.chat.CopyFrom(request.chat)
        async for _ in front.stub.Generate(made):
            pass
        response = await front.stub.Tokenize(request)
        ids = list(response.token_ids)
        submitted = front.core.submits[-1].tokens
        assert b"".join(token_id.to_bytes(4, "little") for token_id in ids) == submitted


async def test_detokenize_is_the_reverse(front: Front) -> None:
    tokens = await front.stub.Tokenize(pb.TokenizeRequest(text="<s>The fox 日本"))
    skipped = await front.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert skipped.text == "The fox 日本"
    request = pb.DetokenizeRequest(token_ids=tokens.token_ids, skip_special_tokens=False)
    assert (await front.stub.Detokenize(request)).text == "<s>The fox 日本"


async def test_get_model_describes_model_and_limits(front: Front) -> None:
    model = await front.stub.GetModel(pb.GetModelRequest())
    assert model.name == "tiny"
    assert model.architecture == "LlamaForCausalLM"
    assert model.vocab_size == READY.vocab_size
    assert model.max_model_tokens == READY.max_model_tokens
    assert tuple(model.eos_token_ids) == front.text.eos_token_ids
    assert model.has_chat_template
    assert model.server_version


async def test_an_eos_id_that_is_no_token_is_left_out(front: Front) -> None:
    eos = front.text.eos_token_ids
    front.text.eos_token_ids = (-1, *eos)
    model = await front.stub.GetModel(pb.GetModelRequest())
    assert tuple(model.eos_token_ids) == eos
