"""Which matrices are streamed, and how: what a program takes of them, and where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenloom.worker.weights.linears import DenseLinear

streamed = pytest.importorskip("tokenloom.worker.kernels.streamed")  # needs Triton
choose_cut = pytest.importorskip("tokenloom.worker.kernels.linear").choose_cut

MATRICES = [
    *[(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],  # Llama-3 8B
    *[(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)],  # Qwen3 0.6B
    *[(10240, 5120), (5120, 25600), (8192, 1024), (8192, 3584), (33, 72), (7, 8)],
]


@pytest.mark.parametrize(("num_lines", "num_inputs"), MATRICES)
@pytest.mark.parametrize("in_parts", [False, True])
def test_two_programs_fit_on_a_multiprocessor_and_each_looks_ahead(
    num_lines: int, num_inputs: int, in_parts: bool
) -> None:
    for num_rows in range(2, 129):
        tiling = streamed.tile(num_rows, num_lines, num_inputs, in_parts=in_parts)
        step_bytes = 2 * (tiling.num_lines + tiling.num_rows) * tiling.num_inputs
        assert tiling.num_rows >= num_rows
        assert tiling.num_stages >= 2
        assert 2 * tiling.num_stages * step_bytes <= 226 * 1024


@pytest.mark.parametrize(("num_lines", "num_inputs"), MATRICES)
def test_how_inputs_are_split_does_not_depend_on_the_rows(num_lines: int, num_inputs: int) -> None:
    splits = {
        streamed.tile(num_rows, num_lines, num_inputs, in_parts=True).num_splits
        for num_rows in range(2, 129)
    }
    assert len(splits) == 1
    assert splits.pop() * 256 <= max(num_inputs, 256)


def test_only_sums_that_may_stay_in_parts_are_split() -> None:
    assert streamed.tile(8, 4096, 4096, in_parts=False).num_splits == 1
    assert streamed.tile(8, 4096, 4096, in_parts=True).num_splits > 1
    assert streamed.tile(8, 28672, 4096, in_parts=True).num_splits == 1


def test_gate_and_up_are_taken_8_lines_in_turn() -> None:
    weight = torch.arange(48 * 64, dtype=torch.float16).view(48, 64)
    tiling = streamed.tile(8, 48, 64, in_parts=False)
    described = streamed.describe_weight(weight, tiling, gated=True)
    turned = torch.as_strided(weight, described.shape, described.strides).reshape(48, 64)
    gate, up = weight.view(2, 3, 8, 64)
    assert torch.equal(turned, torch.stack((gate, up), dim=1).view(48, 64))
    assert described.block_shape == [4, 2, 8, 128]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("in_parts", "gated"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("num_rows", [2, 64, 128])
def test_kernels_compile_for_hopper_without_one(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    num_rows: int,
    in_parts: bool,
    gated: bool,
    bias: bool,
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from tokenloom.worker.steps import ahead

    monkeypatch.setattr(driver, "_active", object())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", 90, 32)

    class Apart(ahead._NoDevice):
        """Another device's kernels, so that those of other tests' stay uncompiled."""

        def get_current_device(self) -> str:
            return "apart"

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    linear = DenseLinear(weight=empty(2048, 1024), bias=empty(2048) if bias else None)
    tiling = streamed.tile(num_rows, 2048, 1024, in_parts=in_parts)
    with ahead.recorded_launches(target) as launches:
        out = streamed.multiply_streamed(tiling, empty(num_rows, 1024), linear, gated=gated)
    assert out.shape[-2:] == (num_rows, 1024 if gated else 2048)
    driver.set_active(Apart(target))
    (launch,) = launches
    assert launch.kernel.preload(launch.specialization).metadata.shared <= 113 * 1024


def who(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    gated: bool = False,
) -> str:
    weight = torch.empty(num_outputs, num_inputs, dtype=dtype, device="meta")
    linear = DenseLinear(weight=weight, bias=None)
    if choose_cut(num_rows, linear, gated=gated):
        return "lanes"
    return "streamed" if streamed.choose_tiling(num_rows, linear, gated=gated) else "library"


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "generation", lambda _: 9)


@pytest.mark.usefixtures("_hopper")
def test_one_row_is_summed_by_lanes_and_more_are_streamed_where_it_pays() -> None:
    small, large = (6144, 1024), (28672, 4096)
    for shape in (small, large):
        for num_rows, expected in ((0, "library"), (1, "lanes"), (2, "streamed"), (64, "streamed")):
            assert who(num_rows, *shape) == expected
            assert who(num_rows, *shape, gated=True) == expected
            assert who(129, *shape, gated=True) == "library"
    assert who(65, *small) == who(128, *small) == "streamed"
    assert who(65, *large) == who(128, *large) == "library"
    assert who(127, *large, gated=True) == "library"
    assert who(128, *large, gated=True) == "streamed"


@pytest.mark.usefixtures("_hopper")
def test_the_library_has_what_the_copy_engine_or_the_matrix_unit_does_not_take() -> None:
    assert who(8, 24, 64, torch.float16) == "streamed"
    assert who(8, 24, 64, torch.float32) == who(1, 24, 64, torch.float32) == "library"
    assert who(8, 24, 68) == "library"  # the copy engine takes 16 bytes at a time
    assert who(8, 24, 64, gated=True) == "library"  # 12 gates are no number of turns


@pytest.mark.parametrize("generation", [0, 8, 10])
def test_nothing_is_streamed_but_on_hopper(
    monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    monkeypatch.setattr(streamed, "generation", lambda _: generation)
    assert [who(num_rows, 6144, 1024) for num_rows in (1, 2, 64)] == ["lanes", "library", "library"]
