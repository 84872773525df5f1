"""Small random checkpoints of each architecture, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

VOCAB_SIZE = 96

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama-3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "head_dim": 32},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    },
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN_ROPE},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
}


def make_checkpoint(
    folder: Path, name: str, *, max_shard_size: str = "1GB", **changes: object
) -> PreTrainedModel:
    """Writes a random checkpoint and returns transformers' model of it, float32."""
    torch.manual_seed(sum(name.encode()))
    options = SMALL | CONFIGS[name] | changes
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the initial values, so that norms, biases and ties matter.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.eval().save_pretrained(folder, max_shard_size=max_shard_size)
    return model


FOUR_BIT = {"load_in_4bit": True}
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": FOUR_BIT | {"bnb_4bit_quant_type": "nf4"},
    "fp4": FOUR_BIT | {"bnb_4bit_quant_type": "fp4"},
    "nf4-nested": FOUR_BIT | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-in-bfloat16": FOUR_BIT
    | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
"""What transformers' BitsAndBytesConfig takes."""


def skipped(name: str, quantized: str) -> list[str]:
    """Returns the modules to leave dense: the head, and those whose rows are no whole blocks.

    On a CPU bitsandbytes takes each row for the beginning of a block, which is wrong for these.
    """
    if quantized == "int8":
        return ["lm_head"]
    return ["lm_head", "down_proj", *(["o_proj"] if name == "qwen3" else [])]


def load_quantized(
    folder: Path, quantized: str, *, skipped: Sequence[str] | None = None
) -> PreTrainedModel:
    """Returns transformers' model of a dense checkpoint, which bitsandbytes quantizes."""
    return computing_exactly(_quantized_model(folder, quantized, skipped))


def quantize_checkpoint(
    folder: Path, out: Path, quantized: str, *, skipped: Sequence[str] | None = None
) -> PreTrainedModel:
    """Writes what transformers makes of a dense checkpoint, and returns its model of that."""
    _quantized_model(folder, quantized, skipped).save_pretrained(out)
    return computing_exactly(AutoModelForCausalLM.from_pretrained(out, device_map="cpu"))


def _quantized_model(
    folder: Path, quantized: str, skipped: Sequence[str] | None
) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        llm_int8_skip_modules=None if skipped is None else list(skipped), **QUANTIZED[quantized]
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def computing_exactly(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a quantized model whose activations are neither rounded to 16 bits nor to 8."""
    if getattr(model, "is_loaded_in_8bit", False):
        return model.dequantize()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def edit_config(folder: Path, **changes: object) -> None:
    """Overwrites keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


MARGIN = 1e-4
"""Logits this close count as a tie: rounding decides, and it depends on the batch. Computed
twice in different ways, float32 logits of these models differ by up to 2e-5."""


def has_tie(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> bool:
    """Returns whether any token of a greedy completion was won by less than MARGIN.

    No test of equal tokens can be made of such a prompt; choose another one.
    """
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    first, second = logits.topk(2).values.unbind(-1)
    return bool((first - second).min() < MARGIN)


def generate(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Returns transformers' own greedy completion."""
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
    return [int(token) for token in output[0, len(prompt) :]]
