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

from tokenloom.scheduler.front.chat import ChatTemplate, TemplateError, find_template
from tokenloom.scheduler.front.detokenize import Detokenizer, DetokenizerFactory

T = TypeVar("T")

_INLINE_CHARS = 2048
"""Shorter texts are tokenized in the event loop: a thread would cost about as much."""
INLINE_TOKENS = 1024
"""As above, for decoding."""
_NUM_THREADS = 2


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

    async def encode(self, text: str) -> NDArray[np.int32]:
        """Returns the text's token ids, [num_tokens]; no special token is added."""
        return await self.offload(len(text) > _INLINE_CHARS, lambda: self._encode(text))

    async def encode_chat(self, messages: Sequence[tuple[str, str]]) -> NDArray[np.int32]:
        """Returns the token ids of (role, content) messages. Raises TemplateError."""
        num_chars = sum(len(content) for _, content in messages)
        return await self.offload(
            num_chars > _INLINE_CHARS, lambda: self._encode(self._render(messages))
        )

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of token ids; unknown ids have none."""
        return await self.offload(
            len(ids) > INLINE_TOKENS,
            lambda: self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens),
        )

    async def offload(self, is_long: bool, work: Callable[[], T]) -> T:  # noqa: FBT001 - a condition
        """Runs long work on text in a thread, so that streams do not stall."""
        if is_long:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        return work()

    def close(self) -> None:
        """Ends the threads; what they work on is finished and dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        if self._template is None:
            raise TemplateError("the served model has no chat template")
        return self._template.render(messages)

    def _encode(self, text: str) -> NDArray[np.int32]:
        # The batch call lets go of the interpreter lock and computes no offsets.
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.asarray(encoding.ids, dtype=np.int32)


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
        compiled = None if template is None else ChatTemplate(template, special_tokens)
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
