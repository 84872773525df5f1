"""Small checkpoints for the front: a tokenizer, a chat template, no weights."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it stops. ",
    "naïve café über 日本語 🎉🎈 Ωmega; user assistant system\n",
]


def byte_level_tokenizer() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it; with added tokens of all kinds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token in ("é", "日本", "two words")]
    )
    return tokenizer


def byte_fallback_tokenizer(decoder: decoders.Decoder | None = None) -> Tokenizer:
    """As SentencePiece models have it; the default decoder is Llama 2's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁▁", "a", "b", "ab", "▁a", "▁ab", "▁he", "é", "日", "▁日", "\ufffd", " x"]
    for piece in pieces:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.decoder = decoder or decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def write_checkpoint(
    folder: Path, tokenizer: Tokenizer, *, template: object = TEMPLATE, **tokenizer_config: object
) -> Path:
    """Writes what the front reads of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|im_end|>")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": eos}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        **({} if template is None else {"chat_template": template}),
        **tokenizer_config,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
