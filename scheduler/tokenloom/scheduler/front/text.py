"""What the front knows of a checkpoint: tokenizer, chat template, end-of-sequence ids."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tokenloom.scheduler.front.chat import (
    ChatTemplate,
    PromptTooLong,
    TemplateError,
    find_template,
)
from tokenloom.scheduler.front.detokenize import Detokenizer, DetokenizerFactory
from tokenloom.scheduler.front.errors import Overloaded
from tokenloom.scheduler.front.trial import try_template

T = TypeVar("T")

_INLINE_CHARS = 2048
"""Shorter texts are tokenized in the event loop: a thread would cost about as much."""
TOKEN_CHARS = 2
"""Decoding a token is about as much work as encoding so many characters."""
_MESSAGE_CHARS = 64
"""Rendering a message of a chat is, beside its text."""
_NUM_THREADS = 2
_LONG_CHARS = 256 * 1024
"""Longer texts wait for each other, in a thread of their own, and not the shorter ones for them."""
_MAX_WAITING_CHARS = 64 * 1024 * 1024
"""Of texts that wait for a thread, in all; more are refused."""
_CHUNK_CHARS = 64 * 1024
"""Of a text that is unlikely to fit, so much is counted at once."""
_LIKELY_BYTES = 4
"""A text of fewer bytes for each token that fits is likely to fit."""
_RETRY_S = 1.0


class CheckpointError(Exception):
    """The checkpoint lacks something that serving it needs."""


class TextModel:
    """The text side of one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        eos_token_ids: tuple[int, ...] = (),
        architecture: str = "",
        fingerprint: str = "",
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._detokenizers = DetokenizerFactory(tokenizer)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="text")
        self._long_thread = ThreadPoolExecutor(1, thread_name_prefix="long text")
        self._num_waiting_chars = 0
        self.eos_token_ids = eos_token_ids
        self.architecture = architecture
        self.fingerprint = fingerprint
        """Names the files that it was read from."""
        self.longest_token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._template is not None

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """Returns the detokenizer of one stream."""
        return self._detokenizers.new(skip_special_tokens=skip_special_tokens)

    async def encode(self, text: str, *, most_tokens: int | None = None) -> NDArray[np.int32]:
        """Returns the text's token ids, [num_tokens]; no special token is added.

        Raises PromptTooLong where they are obviously more than `most_tokens`, and Overloaded.
        """
        errand = _Errand()
        try:
            return await self.offload(len(text), lambda: self._encode(text, most_tokens, errand))
        finally:
            errand.is_over = True

    async def encode_chat(
        self,
        messages: Sequence[tuple[str, str]],
        *,
        most_tokens: int | None = None,
        max_chars: int | None = None,
    ) -> NDArray[np.int32]:
        """Returns the token ids of (role, content) messages.

        Raises TemplateError and, as `encode`, PromptTooLong and Overloaded.
        """
        errand = _Errand()

        def work() -> NDArray[np.int32]:
            return self._encode(self._render(messages, max_chars), most_tokens, errand)

        num_chars = sum(_MESSAGE_CHARS + len(content) for _, content in messages)
        try:
            return await self.offload(num_chars, work)
        finally:
            errand.is_over = True

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of token ids; unknown ids have none. Raises Overloaded."""
        return await self.offload(
            TOKEN_CHARS * len(ids),
            lambda: self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens),
        )

    async def offload(self, num_chars: int, work: Callable[[], T]) -> T:
        """Runs long work on text in a thread, so that streams do not stall. Raises Overloaded."""
        if num_chars <= _INLINE_CHARS:
            return work()
        if self._num_waiting_chars + num_chars > _MAX_WAITING_CHARS:
            raise Overloaded(
                "QUEUE_FULL",
                f"{self._num_waiting_chars} characters wait to be tokenized and this request has "
                f"{num_chars}; at most {_MAX_WAITING_CHARS} may wait",
                _RETRY_S,
            )
        threads = self._threads if num_chars <= _LONG_CHARS else self._long_thread
        self._num_waiting_chars += num_chars
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        finally:
            self._num_waiting_chars -= num_chars

    def close(self) -> None:
        """Ends the threads; what they work on is finished and dropped."""
        for threads in (self._threads, self._long_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    def _render(self, messages: Sequence[tuple[str, str]], max_chars: int | None) -> str:
        if self._template is None:
            raise TemplateError("the served model has no chat template")
        return self._template.render(messages, max_chars=max_chars)

    def _encode(self, text: str, most_tokens: int | None, errand: _Errand) -> NDArray[np.int32]:
        if most_tokens is not None and len(text) > _CHUNK_CHARS:
            num_bytes = len(text.encode())
            if num_bytes > _LIKELY_BYTES * most_tokens:
                self._look_through(text, most_tokens, errand)
        # The batch call lets go of the interpreter lock and computes no offsets.
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.asarray(encoding.ids, dtype=np.int32)

    def _look_through(self, text: str, most_tokens: int, errand: _Errand) -> None:
        """Raises PromptTooLong for a text with more than twice as many tokens as fit.

        A text costs some 450 bytes for each of its own while it is tokenized, so it is counted
        by pieces before. Where pieces meet, the count is wrong by a few.
        """
        num_tokens = 0
        for start in range(0, len(text), _CHUNK_CHARS):
            if errand.is_over:
                raise asyncio.CancelledError
            chunk = text[start : start + _CHUNK_CHARS]
            num_tokens += len(
                self._tokenizer.encode_batch_fast([chunk], add_special_tokens=False)[0]
            )
            if num_tokens > 2 * most_tokens:
                raise PromptTooLong(
                    f"prompt has more than {most_tokens} tokens; this server accepts {most_tokens}"
                )


class _Errand:
    """Tells a thread whether anybody waits for it."""

    is_over = False


def load_text_model(model: str) -> TextModel:
    """Reads the text side of a local folder or a Hub id. Raises CheckpointError."""
    folder = _folder(model)

    def read(name: str) -> str | None:
        path = folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def read_object(name: str) -> Mapping[str, object]:
        text = read(name)
        try:
            entries = {} if text is None else json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{folder / name} is not JSON: {error}") from error
        if not isinstance(entries, dict):
            raise CheckpointError(f"{folder / name} holds no JSON object")
        return entries

    source = read("tokenizer.json")
    if source is None:
        raise CheckpointError(
            f"{folder} has no tokenizer.json; save the tokenizer in the fast format "
            "(transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    config = read_object("config.json")
    tokenizer_config = read_object("tokenizer_config.json")
    special_tokens = _special_tokens({**read_object("special_tokens_map.json"), **tokenizer_config})
    try:
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
    try:
        template = find_template(read, tokenizer_config)
        compiled = None
        if template is not None:
            try_template(template, special_tokens)
            compiled = ChatTemplate(template, special_tokens)
    except TemplateError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    eos_token_ids = _eos_token_ids(read_object("generation_config.json"), config)
    return TextModel(
        tokenizer,
        template=compiled,
        eos_token_ids=eos_token_ids,
        architecture=_architecture(config),
        fingerprint=digest_of(repr((source, template, special_tokens, eos_token_ids)).encode()),
    )


def digest_of(*parts: bytes) -> str:
    """Returns a name for parts, in hexadecimal: another one if any of them differs."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()


def _folder(model: str) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja"]))
    except HFValidationError as error:
        raise CheckpointError(f"{model!r} is neither a folder nor a Hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {model}, and as a Hub id it cannot be fetched: {error}"
        ) from error


def _special_tokens(entries: Mapping[str, object]) -> dict[str, str]:
    """Returns `bos_token` and its like, each given as a string or as an object."""
    tokens = {}
    for name, entry in entries.items():
        token = entry.get("content") if isinstance(entry, dict) else entry
        if name.endswith("_token") and isinstance(token, str):
            tokens[name] = token
    return tokens


def _eos_token_ids(*configs: Mapping[str, object]) -> tuple[int, ...]:
    """Returns the end-of-sequence ids of the first config that names one or several."""
    for config in configs:
        entry = config.get("eos_token_id")
        ids = tuple(entry if isinstance(entry, list) else [entry])
        if ids and all(isinstance(token_id, int) for token_id in ids):
            return ids
    return ()


def _architecture(config: Mapping[str, object]) -> str:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""
