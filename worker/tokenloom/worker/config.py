"""What a checkpoint's config.json says, as the decoder needs it. Pure: no torch, no files.

The four families share one decoder and differ in a few facts, all of them here:

    architecture       q, k, v bias       o bias           q, k norm   window
    LlamaForCausalLM   attention_bias     attention_bias   –           –
    MistralForCausalLM –                  –                –           sliding_window
    Qwen2ForCausalLM   always             –                –           by layer
    Qwen3ForCausalLM   attention_bias     attention_bias   always      by layer

Defaults of absent keys are those of transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from tokenloom.worker.errors import CheckpointError, UnsupportedModelError
from tokenloom.worker.weights.formats import stored_format_name

Json: TypeAlias = Mapping[str, object]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class PlainRope:
    """Rotary embedding as it was first described; `linear` divides positions by `factor`."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept."""

    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_tokens: int


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """YaRN (arXiv 2309.00071): a ramp between kept and divided frequencies."""

    theta: float
    factor: float
    original_max_tokens: int
    attention_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None
    beta_fast: float
    beta_slow: float
    truncate: bool


Rope: TypeAlias = PlainRope | Llama3Rope | YarnRope


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_tokens: int
    """The longest context that the checkpoint is made for."""
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    """[num_layers] positions that a token sees, itself among them; None: all before it."""
    dtype: str | None
    """The checkpoint's own, as config.json tells it."""
    quantized_to: str | None
    """The name of the format in which the checkpoint has matrices; None: all are dense."""

    @staticmethod
    def parse(config: Json) -> ModelConfig:
        """Reads a config.json.

        Raises:
            UnsupportedModelError: An architecture or a feature that is not built.
            CheckpointError: A key is missing or has a value that cannot be.
        """
        return _Parser(config).parse()


@dataclass(frozen=True, kw_only=True)
class _Absent:
    """What a family takes for keys that its config.json lacks; None: what follows from others."""

    num_kv_heads: int | None
    head_dim: int | None
    max_positions: int


_ABSENT = {
    "LlamaForCausalLM": _Absent(num_kv_heads=None, head_dim=None, max_positions=2048),
    "MistralForCausalLM": _Absent(num_kv_heads=8, head_dim=None, max_positions=131072),
    "Qwen2ForCausalLM": _Absent(num_kv_heads=32, head_dim=None, max_positions=32768),
    "Qwen3ForCausalLM": _Absent(num_kv_heads=32, head_dim=128, max_positions=32768),
}


class _Parser:
    def __init__(self, config: Json) -> None:
        self._config = config

    def parse(self) -> ModelConfig:
        architecture = self._architecture()
        self._refuse_what_is_not_built()
        hidden_size = self._int("hidden_size")
        num_heads = self._int("num_attention_heads")
        absent = _ABSENT[architecture]
        num_kv_heads = self._given("num_key_value_heads", absent.num_kv_heads) or num_heads
        head_dim = self._given("head_dim", absent.head_dim) or hidden_size // num_heads
        if num_heads % num_kv_heads or head_dim % 2:
            raise CheckpointError(
                f"config.json has {num_heads} heads, {num_kv_heads} key-value heads and head_dim"
                f" {head_dim}: the heads must divide evenly and head_dim be even"
            )
        attention_bias = architecture in (
            "LlamaForCausalLM",
            "Qwen3ForCausalLM",
        ) and self._bool("attention_bias", default=False)
        max_position_embeddings = self._int("max_position_embeddings", absent.max_positions)
        rope = self._rope(max_position_embeddings)
        return ModelConfig(
            architecture=architecture,
            vocab_size=self._int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self._int("intermediate_size"),
            num_layers=self._int("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_model_tokens=_max_model_tokens(rope, max_position_embeddings),
            rms_norm_eps=_number(self._config, "rms_norm_eps", 1e-6),
            rope=rope,
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            o_bias=attention_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and self._bool("mlp_bias", default=False),
            qk_norm=architecture == "Qwen3ForCausalLM",
            tied_embeddings=self._bool("tie_word_embeddings", default=False),
            windows=self._windows(architecture),
            dtype=self._dtype(),
            quantized_to=stored_format_name(self._config.get("quantization_config")),
        )

    def _architecture(self) -> str:
        names = self._config.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"architectures {names} of config.json are not supported;"
                f" supported are {', '.join(ARCHITECTURES)}"
            )
        return str(names[0])

    def _refuse_what_is_not_built(self) -> None:
        activation = self._config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModelError(f"hidden_act {activation!r} is not supported; silu is")

    def _windows(self, architecture: str) -> tuple[int | None, ...]:
        num_layers = self._int("num_hidden_layers")
        if architecture == "LlamaForCausalLM":
            return (None,) * num_layers
        window = self._window()
        if architecture == "MistralForCausalLM":
            return (window,) * num_layers
        if not self._bool("use_sliding_window", default=False):
            window = None
        layer_types = self._config.get("layer_types")
        if isinstance(layer_types, list):
            if len(layer_types) != num_layers:
                raise CheckpointError(
                    f"config.json has {len(layer_types)} layer_types for {num_layers} layers"
                )
            return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
        first = self._int("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))

    def _window(self) -> int | None:
        if "sliding_window" in self._config and self._config["sliding_window"] is None:
            return None
        return self._int("sliding_window", 4096)

    def _rope(self, max_position_embeddings: int) -> Rope:
        """Reads `rope_parameters` or, as before transformers 5, `rope_theta` + `rope_scaling`."""
        parameters = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if not isinstance(parameters, Mapping):
            raise CheckpointError(f"config.json has rope parameters {parameters!r}")
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        theta = _number(parameters, "rope_theta", _number(self._config, "rope_theta", 10000.0))
        original = int(
            _number(parameters, "original_max_position_embeddings", max_position_embeddings)
        )
        match rope_type:
            case "default":
                return PlainRope(theta=theta)
            case "linear":
                return PlainRope(theta=theta, factor=_number(parameters, "factor"))
            case "llama3":
                return Llama3Rope(
                    theta=theta,
                    factor=_number(parameters, "factor"),
                    low_freq_factor=_number(parameters, "low_freq_factor"),
                    high_freq_factor=_number(parameters, "high_freq_factor"),
                    original_max_tokens=original,
                )
            case "yarn":
                return YarnRope(
                    theta=theta,
                    factor=_number(parameters, "factor"),
                    original_max_tokens=original,
                    attention_factor=_optional_number(parameters, "attention_factor"),
                    mscale=_optional_number(parameters, "mscale"),
                    mscale_all_dim=_optional_number(parameters, "mscale_all_dim"),
                    beta_fast=_optional_number(parameters, "beta_fast") or 32.0,
                    beta_slow=_optional_number(parameters, "beta_slow") or 1.0,
                    truncate=parameters.get("truncate", True) is not False,
                )
            case _:
                raise UnsupportedModelError(
                    f"rope type {rope_type!r} is not supported; supported are"
                    f" {', '.join(ROPE_TYPES)}"
                )

    def _dtype(self) -> str | None:
        dtype = self._config.get("dtype") or self._config.get("torch_dtype")
        return None if dtype is None else str(dtype)

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"config.json has {key} = {value!r}; a positive integer is needed"
            )
        return value

    def _given(self, key: str, absent: int | None) -> int | None:
        """Returns an integer that may be null, which says another thing than no key."""
        if key not in self._config:
            return absent
        return None if self._config[key] is None else self._int(key)

    def _bool(self, key: str, *, default: bool) -> bool:
        value = self._config.get(key)
        return default if value is None else bool(value)


def _max_model_tokens(rope: Rope, max_position_embeddings: int) -> int:
    # YaRN is switched on by hand in a config whose other keys stay as they were.
    if isinstance(rope, YarnRope):
        return max(max_position_embeddings, int(rope.factor * rope.original_max_tokens))
    return max_position_embeddings


def _number(config: Json, key: str, default: float | None = None) -> float:
    value = _optional_number(config, key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json lacks {key}")
    return value


def _optional_number(config: Json, key: str) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json has {key} = {value!r}; a number is needed")
    return float(value)
