"""Training text for the pocket model: chat format, tokenizer and packed rows.

A conversation is rendered exactly as the chat template in CHAT_TEMPLATE
renders it, so what the model sees in training is what a server sends it.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from . import tasks
from .stories import HEROES, PLACES, tell

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)  # ids 0 to 5, in this order
PAD_ID, BEGIN_ID, END_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID = range(6)

VOCAB_SIZE = 1024
MAX_POSITIONS = 2048

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Messages = list[tuple[str, str]]  # (role, content), as in {"role": ..., "content": ...}

# How often each task is drawn in training; the harder ones more often.
TASK_WEIGHTS: dict[str, float] = {
    "addition": 0.05,
    "addition2": 0.06,
    "addition3": 0.10,
    "subtraction": 0.07,
    "subtraction2": 0.07,
    "subtraction3": 0.12,
    "sorting": 0.10,
    "copying": 0.09,
    "reversing": 0.11,
    "counting": 0.10,
    "lookup": 0.09,
    "stories": 0.04,
}

_SYSTEM_SENTENCES = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers briefly.",
    "Answer briefly.",
    "Answer with the result only.",
    "Be kind and exact.",
    "You are a careful calculator.",
    "You help children with their homework.",
    "Never explain your answer.",
    "Think before you answer.",
    "You are a small model that runs on one machine.",
    "Reply in plain English.",
    "The user is in a hurry.",
)


def render(messages: Messages, *, add_generation_prompt: bool = False) -> str:
    """Render as the chat template does; contents must have no outer white space."""
    turns = "".join(f"<|{role}|>{content}{END}" for role, content in messages)
    return BEGIN + turns + (ASSISTANT if add_generation_prompt else "")


def _system_message(rng: random.Random) -> str:
    """One to three sentences; at times a name, a made-up word or a whole story."""
    sentences = []
    for _ in range(1 + int(rng.random() * 3)):
        draw = rng.random()
        if draw < 0.7:
            sentences.append(_SYSTEM_SENTENCES[int(rng.random() * len(_SYSTEM_SENTENCES))])
        elif draw < 0.85:
            sentences.append(f"Your name is {rng.choice(HEROES).name}.")
        elif draw < 0.97:
            sentences.append(f'The word of the day is "{tasks.made_up_word(rng, 3, 8)}".')
        else:
            sentences.append(_known_story(rng))
    return " ".join(sentences)


def _known_story(rng: random.Random) -> str:
    """A story that is not held out."""
    return tasks.training("stories", rng).answer


def conversation(rng: random.Random) -> Messages:
    """Draw one conversation, at times with a system message.

    Most have one exchange, many two to eight, and one in fifty up to forty.
    """
    messages: Messages = []
    if rng.random() < 0.25:
        messages.append(("system", _system_message(rng)))
    draw = rng.random()
    exchanges = 1
    if draw > 0.98:
        exchanges = 9 + int(rng.random() * 32)
    elif draw > 0.6:
        exchanges = 2 + int(rng.random() ** 2 * 7)
    names = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=exchanges)
    for name in names:
        example = tasks.training(name, rng)
        messages += [("user", example.prompt), ("assistant", example.answer)]
    return messages


def _tokenizer_corpus(seed: int) -> Iterator[str]:
    """Text whose words deserve tokens of their own: stories, and a little of all else."""
    rng = random.Random(seed)
    for hero in HEROES:
        for place in PLACES:
            yield f" {tell(hero.name, place.name)} {hero.name} {place.name}"
    for _ in range(2000):
        for role, content in conversation(rng):
            yield " " + (content if role == "user" else "")


def build_tokenizer(seed: int) -> Tokenizer:
    """Train the byte-level BPE tokenizer; the same seed gives the same tokenizer.

    A word with a space in front may become one token.  Digits, and the letters
    of a word with no space in front (after a quote, say), are always split one
    by one, because the model has to see them to reverse, count and add.
    Encoding adds no special tokens of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" \p{L}+|\p{L}|\p{N}|\s|[^\s\p{L}\p{N}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(seed), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the corpus gave only {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": MAX_POSITIONS,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def packed_rows(
    tokenizer: Tokenizer, rows: int, length: int, rng: random.Random
) -> npt.NDArray[np.uint16]:
    """Return rows of conversations laid end to end.

    Every row starts with a conversation's beginning; its last one may be cut off.
    """
    out = np.empty((rows, length), dtype=np.uint16)
    row, used = 0, 0
    while True:
        texts = [render(conversation(rng)) for _ in range(256)]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoding.ids[: length - used]
            out[row, used : used + len(ids)] = ids
            used += len(ids)
            if used == length:
                row, used = row + 1, 0
                if row == rows:
                    return out
