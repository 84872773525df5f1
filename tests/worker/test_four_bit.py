"""Matrices of 4 bits, as far as a machine without a GPU can tell."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from tests.worker.four_bit_cases import four_bit_linear
from tokenloom.worker.errors import CudaError
from tokenloom.worker.weights import linears
from tokenloom.worker.weights.linears import FourBitLinear
from tokenloom.worker.weights.merged import outline

pytest.importorskip("triton")

from tokenloom.worker.kernels import cuda, four_bit
from tokenloom.worker.kernels.four_bit import Few, Tuned, Wide, choose, tuned_for

H200 = tuned_for("NVIDIA H200", (9, 0))
OTHER = tuned_for("NVIDIA A10", (8, 6))
LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BF16 = torch.bfloat16

needs_compiler = pytest.mark.skipif(cuda.why_not() is not None, reason="needs NVRTC")


def chosen(num_rows: int, matrix: str) -> tuple[str, tuple[int, int, int]] | None:
    """Returns what is launched on an H200, and in how many programs."""
    num_lines, num_inputs = LAYER[matrix]
    way = choose(H200, num_rows, num_lines, num_inputs)
    if way is None:
        return None
    if isinstance(way, Few):
        return way.instance, way.grid(num_lines, num_inputs, 132).programs
    return way.instance, way.grid(num_rows, num_lines).programs


def test_what_was_fastest_on_an_h200_is_chosen() -> None:
    assert chosen(1, "down") == ("FEW(1, 8, 2, 2)", (256, 1, 1))
    assert chosen(2, "gate_up") == ("WIDE(8, 4, 3, 2)", (224, 1, 1))
    assert chosen(3, "gate_up") == ("WIDE(8, 4, 3, 2)", (224, 1, 1))
    assert chosen(8, "qkv") == ("WIDE(8, 4, 3, 2)", (48, 4, 1))
    assert chosen(8, "o") == ("WIDE(8, 4, 3, 2)", (32, 6, 1))
    assert chosen(16, "down") == ("WIDE(16, 4, 3, 2)", (32, 6, 1))
    assert chosen(32, "gate_up") == ("WIDE(32, 4, 2, 2)", (224, 1, 1))
    assert chosen(64, "qkv") == ("WIDE(64, 2, 3, 2)", (48, 4, 1))
    assert chosen(128, "qkv") == ("WIDE(128, 2, 4, 1)", (48, 2, 1))
    assert chosen(128, "down") == ("WIDE(128, 2, 4, 1)", (32, 3, 1))
    assert chosen(256, "o") == ("WIDE(128, 2, 4, 1)", (32, 2, 2))
    assert chosen(256, "gate_up") == ("WIDE(128, 2, 4, 1)", (224, 1, 2))
    assert chosen(257, "o") is None


@pytest.mark.parametrize("num_inputs", [64, 512, 4096, 14336, 28672, 10**6])
def test_up_to_256_rows_a_matrix_of_any_size_has_a_kernel_on_hopper(num_inputs: int) -> None:
    at_once = dict(H200.clusters) | {1: 10**9}
    for num_rows in range(1, 257):
        for num_lines in range(1, 200_000, 7777):
            way = choose(H200, num_rows, num_lines, num_inputs)
            assert way is not None
            if isinstance(way, Wide):
                num_tiles, num_splits, num_runs = way.grid(num_rows, num_lines).programs
                assert num_tiles * num_runs <= way.programs * at_once[num_splits]
                # The kernel's programs have a step each.
                assert num_splits == 1 or num_inputs >= num_splits * 64 * way.step


def test_every_program_finds_room_in_shared_memory() -> None:
    for tuned in (H200, OTHER):
        for wide in tuned.wide:
            assert wide.programs * (wide.shared_bytes + 1024) <= tuned.shared_bytes
            # Copies to shared memory are swizzled in pieces of 1,024 bytes.
            for box in (wide.codes_box, wide.rows_box):
                assert box.num_lines * box.line_bytes % 1024 == 0
        for num_rows in range(1, 5):
            for num_inputs in range(64, 40_000, 64):
                way = choose(tuned, num_rows, 4096, num_inputs)
                if isinstance(way, Few):
                    room = tuned.shared_bytes // way.programs - 1024
                    assert way.shared_bytes(num_inputs) <= room


def test_a_cluster_has_at_most_eight_programs() -> None:
    assert all(2 <= size <= 8 for size, _ in H200.clusters)


def test_a_gpu_without_a_table_takes_that_of_its_generation() -> None:
    assert tuned_for("NVIDIA H100 PCIe", (9, 0)) == H200
    assert OTHER.wide == ()
    assert choose(OTHER, 1, 4096, 4096) is not None
    assert choose(OTHER, 5, 4096, 4096) is None
    assert tuned_for("NVIDIA B200", (10, 0)) == OTHER


def test_a_table_with_a_name_that_means_nothing_is_refused() -> None:
    path = Path(four_bit.__file__).parent / "tuned" / "default.toml"
    table = tomllib.loads(path.read_text())
    table["few"][0].pop("depth")
    with pytest.raises(msgspec.ValidationError, match="depth"):
        msgspec.convert(table, Tuned)


def test_steps_without_content_tell_which_kernels_there_are_to_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(four_bit, "_num_processors", lambda _: 132)
    linear = outline(four_bit_linear(300, 128, device="cpu"))
    few, wide = choose(H200, 1, 300, 128), choose(H200, 20, 300, 128)
    assert isinstance(few, Few)
    assert isinstance(wide, Wide)
    with cuda.recorded_kernels() as kernels:
        for way, num_rows in ((few, 1), (wide, 20), (few, 1)):
            rows = torch.empty(num_rows, 128, dtype=BF16, device="meta")
            assert four_bit.multiply_four_bit(way, rows, linear).shape == (num_rows, 300)
    assert [kernel.instance for kernel in kernels] == [few.instance, wide.instance]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("at_once", [120, 50, 1])
def test_a_large_matrix_is_made_dense_by_parts(
    monkeypatch: pytest.MonkeyPatch, at_once: int, given: bool, bias: bool
) -> None:
    sizes: list[int] = []

    def make_dense(linear: FourBitLinear, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(linear.codes.numel() * 2)
        return linear.dense(dtype)

    monkeypatch.setattr(four_bit, "make_dense", make_dense)
    monkeypatch.setattr(linears, "DENSE_BYTES", 4 * at_once * 128)
    linear = four_bit_linear(120, 128, bias=bias, dtype=torch.float32, device="cpu")
    rows = torch.randn(7, 128)
    out = torch.full((7, 120), float("nan")) if given else None
    product = four_bit.multiply_dense(rows, linear, out)
    torch.testing.assert_close(product, linear(rows))
    assert (product is out) == given
    assert max(sizes) == at_once * 128
    assert sum(sizes) == 120 * 128


def test_parts_begin_where_the_library_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    begins: list[int] = []

    def mm(rows: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> None:
        begins.append(int(out.storage_offset()))
        out.copy_(rows @ weight)

    linear = four_bit_linear(300, 128, dtype=torch.float32, device="cpu")
    rows = torch.randn(7, 128)
    expected = linear(rows)
    monkeypatch.setattr(linears, "DENSE_BYTES", 4 * 100 * 128)
    monkeypatch.setattr(four_bit, "make_dense", FourBitLinear.dense)
    monkeypatch.setattr(torch, "mm", mm)
    torch.testing.assert_close(four_bit.multiply_dense(rows, linear), expected)
    assert begins == [0, 64, 128, 192, 256]


def test_other_block_sizes_types_and_devices_are_left_to_the_twin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = four_bit_linear(64, 128, device="cpu")
    assert not four_bit.has_kernels(linear, BF16)
    monkeypatch.setattr(four_bit, "_has_kernels", lambda _: True)
    assert four_bit.has_kernels(linear, BF16)
    assert not four_bit.has_kernels(linear, torch.float32)
    assert not four_bit.has_kernels(four_bit_linear(64, 128, block_size=128, device="cpu"), BF16)
    assert not four_bit.has_kernels(replace(linear, codes=linear.codes[:, :63]), BF16)


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("tuned", "architecture"), [(H200, "sm_90a"), (OTHER, "sm_80")])
def test_every_kernel_of_the_tables_compiles(
    tuned: Tuned, architecture: str, dtype: torch.dtype
) -> None:
    ways: tuple[Few | Wide, ...] = (*tuned.few, *tuned.wide)
    kernels = {four_bit._kernel(way.name, way.instance, dtype) for way in ways}
    for kernel in (*kernels, four_bit._kernel("make_dense", "DENSE", dtype)):
        code = cuda.cubin(kernel, architecture)
        assert code.startswith(b"\x7fELF")
        assert f".text.{kernel.name}\0".encode() in code


@needs_compiler
def test_a_kernel_is_compiled_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOKENLOOM_CUDA_CACHE_DIR", str(tmp_path / "cuda"))
    kernel = four_bit._kernel("make_dense", "DENSE", BF16)
    code = cuda.cubin(kernel, "sm_90a")
    (kept,) = (tmp_path / "cuda").iterdir()
    assert kept.read_bytes() == code
    monkeypatch.setattr(cuda, "_compile", pytest.fail)
    assert cuda.cubin(kernel, "sm_90a") == code


@needs_compiler
def test_the_compilers_words_are_told() -> None:
    kernel = four_bit._kernel("make_dense", "NOTHING", BF16)
    with pytest.raises(CudaError, match=r"four_bit\.cu cannot be compiled with (?s:.*)NOTHING"):
        cuda.cubin(kernel, "sm_90a")
