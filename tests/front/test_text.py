from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import transformers

from tests.front.checkpoints import byte_level_tokenizer, write_checkpoint
from tokenloom.scheduler.front.text import CheckpointError, TextModel, _Errand, load_text_model


@pytest.mark.parametrize(
    "text", ["The quick brown fox", "<s>two words é</s>", " \n\n", "", "日本🎉"]
)
async def test_text_is_tokenized_as_it_stands(checkpoint: Path, text: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False)
    ids = await load_text_model(str(checkpoint)).encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == theirs["input_ids"]


async def test_settings_of_truncation_and_padding_in_the_file_do_not_count(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    text = load_text_model(str(write_checkpoint(tmp_path / "model", tokenizer)))
    assert len(await text.encode("The quick brown fox jumps over the lazy dog")) > 8
    assert len(await text.encode("The")) < 8


async def test_long_texts_are_tokenized_beside_the_event_loop(checkpoint: Path) -> None:
    text = load_text_model(str(checkpoint))
    threads: list[str] = []
    encode = text._encode

    def spy(prompt: str, most_tokens: int | None, errand: _Errand) -> object:
        threads.append(threading.current_thread().name)
        return encode(prompt, most_tokens, errand)

    text._encode = spy  # type: ignore[method-assign, assignment]
    await text.encode("short")
    long = asyncio.create_task(text.encode("The quick brown fox " * 20_000))
    num_turns = 0
    while not long.done():
        num_turns += 1
        await asyncio.sleep(0)
    assert len(await long) >= 80_000
    assert threads[0] == threading.main_thread().name
    assert threads[1].startswith("long text")
    assert num_turns > 2


@pytest.mark.parametrize(
    ("generation_config", "config", "eos"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({}, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": [7, 8]}, (7, 8)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
    ],
)
def test_eos_ids_are_those_that_transformers_generate_takes(
    generation_config: object, config: dict[str, object], eos: tuple[int, ...], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", byte_level_tokenizer())
    (folder / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    assert load_text_model(str(folder)).eos_token_ids == eos


def breaking(name: str, content: str | None, folder: Path) -> Path:
    write_checkpoint(folder, byte_level_tokenizer())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("config.json", "{", "config.json is not JSON"),
        ("tokenizer_config.json", "[]", "holds no JSON object"),
    ],
)
def test_a_broken_checkpoint_is_named(
    name: str, content: str | None, part: str, tmp_path: Path
) -> None:
    folder = breaking(name, content, tmp_path / "model")
    with pytest.raises(CheckpointError, match=part):
        load_text_model(str(folder))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
        load_text_model(str(tmp_path / "nothing" / "here"))


def test_longest_token_bounds_the_bytes_of_a_prompt() -> None:
    text = TextModel(byte_level_tokenizer())
    assert text.longest_token_bytes >= len("<|im_start|>")
