"""Tensors from their files to their places: headers, pieces, threads, errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenloom.worker.errors import CheckpointError
from tokenloom.worker.weights import copying
from tokenloom.worker.weights.checkpoint import read_tensors
from tokenloom.worker.weights.copying import Copying
from tokenloom.worker.weights.filling import Filling, match
from tokenloom.worker.weights.stored import stored_tensors

CPU = torch.device("cpu")
SHAPES = {"one": (1,), "even": (16, 8), "odd": (7, 13), "nothing": (0, 4), "scalar": ()}


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Writes a checkpoint of random tensors and returns them."""
    random = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def places_for(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.full(tensor.shape, 9, dtype=dtype) for name, tensor in tensors.items()}


def fillings(folder: Path, places: Mapping[str, Tensor]) -> list[Filling]:
    return match(read_tensors(folder), places, parts={}, formats={}, dtype=torch.float32)


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("stage_bytes", [16, 96, 1024 * 1024])
def test_every_element_reaches_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int, stage_bytes: int
) -> None:
    monkeypatch.setattr(copying, "STAGE_BYTES", stage_bytes)
    tensors = saved(tmp_path)
    places = places_for(tensors, torch.float32)
    with Copying(fillings(tmp_path, places), CPU, num_threads=num_threads) as under_way:
        under_way.wait(lambda _: None)
    for name, tensor in tensors.items():
        assert torch.equal(places[name], tensor), name
    assert under_way.num_bytes == sum(4 * tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_of_another_type_are_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    monkeypatch.setattr(copying, "STAGE_BYTES", 64)
    tensors = saved(tmp_path, stored)
    places = places_for(tensors, torch.float32)
    with Copying(fillings(tmp_path, places), CPU) as under_way:
        under_way.wait(lambda _: None)
    for name, tensor in tensors.items():
        assert torch.equal(places[name], tensor.to(torch.float32)), name


def test_the_fraction_that_is_told_grows_up_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "STAGE_BYTES", 16)
    places = places_for(saved(tmp_path), torch.float32)
    told: list[float] = []
    with Copying(fillings(tmp_path, places), CPU, num_threads=3) as under_way:
        under_way.wait(told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_a_file_that_shrank_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    places = places_for(saved(tmp_path), torch.float32)
    matched = fillings(tmp_path, places)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - 1])
    with (
        Copying(matched, CPU, num_threads=2) as under_way,
        pytest.raises(CheckpointError, match=f"cannot be read: it ends before byte {size}"),
    ):
        under_way.wait(lambda _: None)


def test_copying_that_is_given_up_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "STAGE_BYTES", 8)
    tensor = torch.zeros(200_000)
    save_file({"large": tensor}, tmp_path / "model.safetensors")
    place = torch.full_like(tensor, 9)
    with Copying(fillings(tmp_path, {"large": place}), CPU):
        pass  # no waiting: another part of the start failed
    assert (place == 9).any()


def test_a_header_tells_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = saved(tmp_path, torch.bfloat16)
    path = tmp_path / "model.safetensors"
    stored = stored_tensors(path)
    assert stored.keys() == tensors.keys()
    content = path.read_bytes()
    for name, tensor in tensors.items():
        assert stored[name].dtype == "BF16"
        assert stored[name].shape == tuple(tensor.shape)
        data = content[stored[name].offset :][: stored[name].num_bytes]
        assert data == bytes(tensor.view(-1).view(torch.uint8).numpy())


def entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (entry(dtype="F12"), "unknown type F12"),
        (entry(shape=[3]), r"shape \(3,\) in F32 is said to lie in bytes 0 to 8"),
        (entry(shape=[-2, -1]), "is said to lie"),
        (entry(data_offsets=[4, 12]), "lies in bytes 4 to 12 of 8"),
        (entry(data_offsets=[-8, 0]), "lies in bytes -8 to 0 of 8"),
        (entry(shape="2"), "cannot be read"),
        ({"a": {}}, "cannot be read"),
        ([], "cannot be read"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: object, said: str) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=said):
        stored_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\1", b"\xff" * 8, b"\2\0\0\0\0\0\0\0{"])
def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        stored_tensors(path)
