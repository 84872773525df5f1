"""`tokenloom plan`: its arithmetic, what it says, and that the worker does as it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.worker.checkpoints import CONFIGS, make_checkpoint
from tests.worker.driver import configuration
from tokenloom.worker.config import ModelConfig
from tokenloom.worker.gpus import GPUS, Gpu, find_gpu
from tokenloom.worker.kv import pool_bytes
from tokenloom.worker.memory import rotary_bytes
from tokenloom.worker.options import CPU_KV_CACHE, WorkerOptions, parse_bytes
from tokenloom.worker.plan.capacity import (
    Checkpoint,
    Plan,
    Precision,
    Row,
    Serving,
    _Case,
    make_plan,
)
from tokenloom.worker.plan.reading import read_checkpoint
from tokenloom.worker.plan.sizes import all_dense
from tokenloom.worker.rotary import rotary_table
from tokenloom.worker.runner import ModelRunner
from tokenloom.worker.weights.formats import EightBits, FourBits

POCKET = Path(__file__).parents[2] / "models" / "pocket"
GIB = 1024**3


def parsed(architecture: str, sizes: Sequence[int], **others: object) -> ModelConfig:
    """Layers, width, MLP's width, heads, key-value heads, vocabulary."""
    layers, hidden, intermediate, heads, kv_heads, vocab = sizes
    return ModelConfig.parse(
        {
            "architectures": [f"{architecture}ForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
            **others,
        }
    )


LLAMA_8B = parsed("Llama", (32, 4096, 14336, 32, 8, 128256))
LLAMA_70B = parsed("Llama", (80, 8192, 28672, 64, 8, 128256))
QWEN_06B = parsed("Qwen3", (28, 1024, 3072, 16, 8, 151936), tie_word_embeddings=True, head_dim=128)
QWEN_8B = parsed("Qwen3", (36, 4096, 12288, 32, 8, 151936), head_dim=128)
QWEN_32B = parsed("Qwen3", (64, 5120, 25600, 64, 8, 151936), head_dim=128)
LLAMA2_7B = parsed("Llama", (32, 4096, 11008, 32, 32, 32000))

BFLOAT16 = Precision(label="bfloat16", form=None)
INT8 = Precision(label="int8", form=EightBits())
NF4 = Precision(label="nf4", form=FourBits(codebook="nf4"))
NF4_HEAD = Precision(label="nf4, head too", form=FourBits(codebook="nf4"), quantizes_head=True)


SERVING = Serving(dtype="bfloat16", kv_types=("bfloat16", "fp8"), context_tokens=4096)


def planned(
    config: ModelConfig, *precisions: Precision, gpu: Gpu | None = None, serving: Serving = SERVING
) -> Plan:
    checkpoint = Checkpoint(name="model", config=config, stored=None)
    return make_plan(checkpoint, serving, precisions or (BFLOAT16,), gpu)


def row(
    config: ModelConfig, precision: Precision, gpu: str = "H200", serving: Serving = SERVING
) -> Row:
    return planned(config, precision, gpu=find_gpu(gpu), serving=serving).rows[0]


@pytest.mark.parametrize(
    ("config", "num_weights"),
    [
        # As the models' pages on the Hub tell.
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_70B, 70_553_706_496),
        (QWEN_06B, 596_049_920),
        (QWEN_8B, 8_190_735_360),
        (QWEN_32B, 32_762_123_264),
    ],
)
def test_weights_are_those_that_are_published(config: ModelConfig, num_weights: int) -> None:
    assert planned(config).num_weights == num_weights
    assert row(config, BFLOAT16).weights_bytes == 2 * num_weights


@pytest.mark.parametrize(
    ("config", "precision", "num_bytes"),
    [
        # 32 layers of 218,103,808 weights; embedding and head of 525,336,576; 65 norms of 4,096.
        (LLAMA_8B, INT8, 6_979_321_856 + 32 * 4 * 43_008 + 2 * 1_050_673_152 + 532_480),
        (LLAMA_8B, NF4, 6_979_321_856 * 9 // 16 + 2 * 1_050_673_152 + 532_480),
        (LLAMA_8B, NF4_HEAD, 3_925_868_544 + 1_050_673_152 + 295_501_824 + 532_480),
        # 80 layers of 855,638,016; embedding and head of 1,050,673,152; 161 norms of 8,192.
        (LLAMA_70B, NF4, 68_451_041_280 * 9 // 16 + 2 * 2_101_346_304 + 161 * 16_384),
        # 28 layers of 15,728,640; a tied embedding of 155,582,464; norms with those of heads. A
        # quantized head is a copy of its own.
        (QWEN_06B, NF4, 440_401_920 * 9 // 16 + 311_164_928 + 2 * (57 * 1024 + 56 * 128)),
        (QWEN_06B, NF4_HEAD, 247_726_080 + 311_164_928 + 87_515_136 + 2 * 65_536),
    ],
)
def test_quantized_weights_take_what_their_codes_and_scales_take(
    config: ModelConfig, precision: Precision, num_bytes: int
) -> None:
    assert row(config, precision).weights_bytes == num_bytes


@pytest.mark.parametrize(
    ("config", "num_bytes"),
    [
        (LLAMA_8B, 131_072),
        (LLAMA_70B, 327_680),
        (QWEN_06B, 114_688),
        (QWEN_8B, 147_456),
        (QWEN_32B, 262_144),
    ],
)
def test_a_token_takes_keys_and_values_of_all_layers(config: ModelConfig, num_bytes: int) -> None:
    # In 8 bits a head of a position has a scale of 4 bytes beside its codes.
    coded = num_bytes // 2 + num_bytes // (2 * config.head_dim) * 4
    assert planned(config).kv_bytes_per_token == {"bfloat16": num_bytes, "fp8": coded}


def test_ranks_divide_all_but_norms() -> None:
    one, two = (
        planned(LLAMA_8B, serving=replace(SERVING, num_ranks=ranks)).rows[0].weights
        for ranks in (1, 2)
    )
    norms = 532_480
    assert two.layers - norms == (one.layers - norms) // 2
    assert (two.embedding, two.head) == (one.embedding // 2, one.head // 2)


def test_fewer_key_value_heads_than_ranks_are_replicated() -> None:
    sizes = [
        planned(LLAMA_70B, serving=replace(SERVING, num_ranks=ranks)).kv_bytes_per_token
        for ranks in (1, 8, 16)
    ]
    assert [size["bfloat16"] for size in sizes] == [327_680, 40_960, 40_960]


def test_tokens_and_requests_are_what_the_pool_holds() -> None:
    pool = row(LLAMA_8B, NF4, "L4", serving=replace(SERVING, context_tokens=4000)).pools[0]
    assert pool.num_tokens == 128 * pool.num_blocks
    assert pool.num_bytes == 131_072 * pool.num_tokens
    assert pool.num_requests == pool.num_blocks // 32  # 31.25 blocks a request
    assert (
        row(LLAMA_8B, NF4, serving=replace(SERVING, max_num_requests=7)).pools[0].num_requests == 7
    )


def test_speed_is_bandwidth_over_the_bytes_of_a_step() -> None:
    pool = row(LLAMA_8B, BFLOAT16, serving=replace(SERVING, context_tokens=1024)).pools[0]
    weights = 16_060_522_496 - 1_050_673_152  # all but the embedding
    for batch, speed in pool.tokens_per_s.items():
        assert speed == pytest.approx(batch * 4.3e12 / (weights + batch * 1024 * 131_072))
    assert list(pool.tokens_per_s) == [1, 4, 16]


def test_a_tied_embedding_is_read_as_the_head_unless_that_is_quantized() -> None:
    plain, quantized = (row(QWEN_06B, precision).weights for precision in (NF4, NF4_HEAD))
    assert plain.read_a_step == plain.total
    assert quantized.read_a_step == quantized.total - quantized.embedding


def test_several_ranks_are_as_fast_as_all_their_bandwidth() -> None:
    one, two = (
        row(LLAMA_8B, NF4, serving=replace(SERVING, num_ranks=ranks)).pools[0].tokens_per_s
        for ranks in (1, 2)
    )
    assert two[1] == pytest.approx(2 * one[1], rel=1e-3)  # norms are read by each


def test_without_a_gpu_each_precision_is_planned_for_the_smallest_that_serves_a_request() -> None:
    rows = planned(
        LLAMA_70B, BFLOAT16, INT8, NF4, serving=replace(SERVING, context_tokens=8192)
    ).rows
    found = [(row.gpu.name if row.gpu else None, row.num_gpus) for row in rows]
    assert found == [("H200", 1), ("A100 80GB", 1), ("A100 80GB", 1)]
    assert all(row.fits for row in rows)
    smaller = [gpu for gpu in GPUS if gpu.memory_bytes < find_gpu("A100-80GB").memory_bytes - GIB]
    for gpu in smaller:
        assert (
            not planned(LLAMA_70B, NF4, gpu=gpu, serving=replace(SERVING, context_tokens=8192))
            .rows[0]
            .fits
        )


def test_what_no_gpu_holds_is_planned_for_several() -> None:
    huge = parsed("Llama", (126, 16384, 53248, 128, 8, 128256))
    (only,) = planned(huge).rows
    assert (only.gpu and only.gpu.name, only.num_gpus) == ("H200", 8)
    larger = parsed("Llama", (512, 16384, 53248, 128, 8, 128256))
    (none,) = planned(larger).rows
    assert (none.gpu, none.smallest, none.fits, none.pools) == (None, None, False, ())


@pytest.mark.parametrize("precision", [BFLOAT16, NF4])
def test_what_lacks_memory_holds_no_request_and_with_that_much_more_it_holds_one(
    precision: Precision,
) -> None:
    for gib in range(1, 40):
        gpu = Gpu(name="some", memory_bytes=gib * GIB, datasheet_bytes_per_s=None)
        (short,) = planned(
            LLAMA_8B, precision, gpu=gpu, serving=replace(SERVING, context_tokens=65536)
        ).rows
        assert short.fits == (short.pools[0].num_requests > 0)
        enough = Gpu(
            name="more",
            memory_bytes=gpu.memory_bytes + short.lacking_bytes + 1,
            datasheet_bytes_per_s=None,
        )
        (held,) = planned(
            LLAMA_8B, precision, gpu=enough, serving=replace(SERVING, context_tokens=65536)
        ).rows
        assert held.fits
        assert held.pools[0].num_requests >= 1


def test_rows_of_a_rank_that_are_no_whole_blocks_cannot_be_quantized_to_4_bits() -> None:
    (nf4, int8) = planned(
        LLAMA2_7B, NF4, INT8, gpu=find_gpu("L4"), serving=replace(SERVING, num_ranks=8)
    ).rows
    assert nf4.obstacle is not None
    assert "the 1376 inputs of model.layers.0.mlp.down_proj that each of 8 ranks" in nf4.obstacle
    assert (nf4.fits, nf4.least_num_gpus) == (False, 1)
    assert (int8.fits, int8.obstacle) == (True, None)


def test_a_matrix_whose_rows_are_no_whole_blocks_stays_dense() -> None:
    ragged = parsed("Llama", (2, 128, 96, 2, 2, 256))  # down: 96 inputs
    sizes = {each.label: row(ragged, each).weights for each in (BFLOAT16, NF4)}
    dense, quantized = 2 * 96 * 128, (4 * 128 * 128 + 2 * 96 * 128) * 9 // 16
    assert sizes["nf4"].layers == 2 * (dense + quantized) + 5 * 128 * 2


def test_a_gpu_without_bfloat16_serves_float16() -> None:
    assert (
        row(QWEN_06B, BFLOAT16, "T4").obstacle == "T4 has no bfloat16; --dtype float16 works there"
    )
    assert row(
        QWEN_06B, BFLOAT16, "T4", serving=replace(SERVING, dtype="float16", kv_types=("float16",))
    ).fits


# Beside the worker itself.


@pytest.mark.parametrize("name", [*CONFIGS, "pocket"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_cache", ["auto", "fp8"])
def test_a_worker_keeps_the_weights_and_blocks_that_were_planned(
    tmp_path: Path, name: str, dtype: str, kv_cache: str
) -> None:
    folder = POCKET
    if name != "pocket":
        make_checkpoint(tmp_path, name)
        folder = tmp_path
    runner = ModelRunner(WorkerOptions(device="cpu"))
    ready = runner.configure(
        configuration(str(folder), dtype=dtype, kv_cache=kv_cache), lambda *_: None
    )
    config = read_checkpoint(str(folder)).config
    kv_type = dtype if kv_cache == "auto" else kv_cache
    plan = planned(config, serving=Serving(dtype=dtype, kv_types=(kv_type,), context_tokens=16))
    assert plan.rows[0].weights_bytes == ready.weights_bytes
    one = plan.kv_bytes_per_token[kv_type] * ready.block_size
    assert ready.num_blocks == parse_bytes(CPU_KV_CACHE) // one
    assert ready.kv_bytes == ready.num_blocks * one


def test_a_worker_on_a_gpu_takes_the_pool_that_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _Case(config=LLAMA_8B, forms=all_dense(LLAMA_8B), serving=SERVING)
    h200 = find_gpu("H200")
    free = case.free_bytes(1, h200)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, h200.memory_bytes))
    num_bytes = pool_bytes(
        torch.device("cuda"),
        fixed_bytes=None,
        memory_fraction=0.92,
        scratch=case.scratch_bytes(1, h200, "bfloat16"),
    )
    pool, _ = case.pools(1, h200)
    assert pool.num_blocks == num_bytes // (128 * 131_072)


def widened_bytes(config: ModelConfig, gpu: Gpu, serving: Serving = SERVING) -> int:
    case = _Case(config=config, forms=all_dense(config), serving=serving)
    own, coded = (case.scratch_bytes(1, gpu, kv_type) for kv_type in ("bfloat16", "fp8"))
    return coded - own


def test_a_pool_in_8_bits_leaves_room_for_what_flash_attn_reads_widened() -> None:
    longest, position = 131_072, 4096  # bytes of a layer's keys and values
    for gpu in (
        *map(find_gpu, ("H100", "H200", "B200")),
        Gpu(name="any", memory_bytes=GIB, datasheet_bytes_per_s=None),
    ):
        assert widened_bytes(LLAMA_8B, gpu) == (longest + 8192) * position


def test_where_triton_reads_keys_and_values_in_8_bits_no_room_is_left() -> None:
    for name in ("L4", "RTX 4090", "L40S", "RTX 5090"):
        assert widened_bytes(LLAMA_8B, find_gpu(name)) == 0
    wide = parsed("Llama", (2, 4096, 14336, 16, 4, 128256), head_dim=256)
    assert widened_bytes(wide, find_gpu("H200")) == 0
    assert widened_bytes(LLAMA_8B, find_gpu("H200"), replace(SERVING, dtype="float32")) == 0


def test_a_gpu_without_8_bit_floats_has_no_pool_in_them() -> None:
    assert [pool.kv_type for pool in row(LLAMA_8B, NF4, "A10G").pools] == ["bfloat16"]
    asked = row(LLAMA_8B, NF4, "A10G", serving=replace(SERVING, kv_types=("fp8",)))
    assert asked.obstacle == "A10G has no 8-bit floats; --kv-cache auto works there"
    assert not asked.fits


def test_memory_that_weights_leave_is_what_an_h200_had() -> None:
    # Serving bfloat16 there in November 2026: blocks of 128 positions in 92 % of what was free
    # less the scratch memory of that day, 16 copies of 256 rows of logits and 8192 tokens.
    measured = (
        (LLAMA_8B, 7092 * 128 * 131_072, 16 * 256 * 128_256 * 4 + 8192 * 108_544 * 2),
        (QWEN_06B, 9091 * 128 * 114_688, 16 * 256 * 151_936 * 4 + 8192 * 32_768 * 2),
    )
    for config, kv_bytes, scratch in measured:
        case = _Case(config=config, forms=all_dense(config), serving=SERVING)
        free = case.free_bytes(1, find_gpu("H200"))
        assert free == pytest.approx(kv_bytes / 0.92 + scratch, rel=0.005)


def test_the_table_of_positions_takes_what_was_planned() -> None:
    table = rotary_table(
        LLAMA_8B.rope,
        head_dim=LLAMA_8B.head_dim,
        num_positions=LLAMA_8B.max_model_tokens,
        device=torch.device("cpu"),
    )
    assert table.nbytes == rotary_bytes(LLAMA_8B)
