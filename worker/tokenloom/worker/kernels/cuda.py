"""Kernels in CUDA C++: compiled by NVRTC when first launched, kept on disk, launched by the driver.

    sources/*, instance, options ─▶ cubin, on disk ─▶ a device's module ─▶ torch's stream

The bindings and the compiler come with torch's CUDA builds. Source: CUDA driver API, NVRTC.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.worker.errors import CudaError
from tokenloom.worker.kernel_cache import cubin_folder
from tokenloom.worker.kernels.overlap import overlaps

_log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "sources"
_MAX_MAPS = 4096
"""More than the matrices of a model, in each form that kernels read them in, and the activations of
a step. So what the next step needs is not among those that were longest not used."""


@dataclass(frozen=True, kw_only=True)
class CudaKernel:
    """A source file, and the one kernel of it that is meant."""

    source: str
    name: str
    instance: str
    """What the file is to take INSTANCE for, so that it defines the kernel"""
    dtype: torch.dtype
    """float16 or bfloat16: what it takes and gives"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How many programs of how many threads."""

    programs: tuple[int, int, int]
    num_threads: int
    shared_bytes: int
    cluster: int = 1
    """Programs, along the grid's second axis, that run at once and read each other's memory"""
    overlapped: bool = False
    """Whether it keeps the rules of `overlap`, and so starts early where the GPU can do that"""


@dataclass(frozen=True)
class Box:
    """A tile that a kernel copies of a matrix, swizzled as wide as it is."""

    num_lines: int
    line_bytes: int
    """64 or 128"""


class TensorMap(ctypes.Structure):
    """What the hardware reads of a matrix."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


def why_not() -> str | None:
    """Returns why no kernel of this kind can be compiled here; None: they can."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed"
    from cuda.bindings import nvrtc  # noqa: PLC0415 - not everywhere

    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return f"NVRTC is not there: {error}"
    return None


@contextmanager
def recorded_kernels() -> Iterator[dict[CudaKernel, None]]:
    """Yields what is launched within it on the meta device, each once, in order."""
    _recorded.clear()
    yield _recorded


_recorded: dict[CudaKernel, None] = {}


def launch(
    kernel: CudaKernel, grid: Grid, device: torch.device, arguments: Sequence[ctypes.Structure]
) -> None:
    """Queues a kernel on torch's current stream; on the meta device it is recorded.

    Raises:
        CudaError: It cannot be compiled or launched.
    """
    if device.type == "meta":
        _recorded[kernel] = None
        return
    from cuda.bindings import driver  # noqa: PLC0415 - not everywhere

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid.programs
    config.blockDimX, config.blockDimY, config.blockDimZ = grid.num_threads, 1, 1
    config.sharedMemBytes = grid.shared_bytes
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    overlapped = grid.overlapped and overlaps(device)
    attributes = _attributes(grid.cluster, overlapped=overlapped)
    config.attrs, config.numAttrs = attributes, len(attributes)
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    function = load(kernel, device)
    _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))


def tensor_map(matrix: Tensor, box: Box) -> TensorMap:
    """Returns the map of a contiguous matrix, by which kernels copy boxes of it.

    Raises:
        CudaError: It does not begin, or its lines do not, at a multiple of 16 bytes.
    """
    if matrix.is_meta:
        return TensorMap()
    num_lines, num_columns = matrix.shape
    return _tensor_map(matrix.data_ptr(), num_lines, num_columns * matrix.itemsize, box)


@cache
def load(kernel: CudaKernel, device: torch.device) -> Any:  # noqa: ANN401 - the driver's handle
    """Returns the kernel on a device that is the thread's own; compiles it if it has to.

    Raises:
        CudaError: It cannot be compiled or loaded.
    """
    from cuda.bindings import driver  # noqa: PLC0415 - not everywhere

    module = _checked(driver.cuModuleLoadData(cubin(kernel, _architecture(device))))
    function = _checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
    has = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    may = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    shared_bytes = _checked(driver.cuDeviceGetAttribute(has, _checked(driver.cuCtxGetDevice())))
    _checked(driver.cuFuncSetAttribute(function, may, shared_bytes))
    return function


def cubin(kernel: CudaKernel, architecture: str) -> bytes:
    """Returns the kernel's code for `sm_90a` and the like, from disk if it is there.

    Raises:
        CudaError: It cannot be compiled.
    """
    from cuda.bindings import nvrtc  # noqa: PLC0415 - not everywhere

    sources = {path.name: path.read_bytes() for path in sorted(_SOURCES.iterdir())}
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"--define-macro=INSTANCE={kernel.instance}",
    ]
    if kernel.dtype == torch.float16:
        options.append("--define-macro=HALF")
    version = _checked(nvrtc.nvrtcVersion())
    digest = hashlib.sha256(repr((sources, kernel.source, options, version)).encode()).hexdigest()
    folder = cubin_folder()
    path = None if folder is None else folder / f"{digest}.cubin"
    if path is not None and path.exists():
        return path.read_bytes()
    compiled = _compile(kernel.source, sources, options)
    if path is not None:
        _keep(path, compiled)
    return compiled


def _compile(source: str, sources: dict[str, bytes], options: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc  # noqa: PLC0415 - not everywhere

    headers = [(name, text) for name, text in sources.items() if name != source]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            sources[source],
            source.encode(),
            len(headers),
            [text for _, text in headers],
            [name.encode() for name, _ in headers],
        )
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            text = log.rstrip(b"\0").decode(errors="replace")
            raise CudaError(f"{source} cannot be compiled with {' '.join(options)}:\n{text}")
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _keep(path: Path, code: bytes) -> None:
    """Writes a file that others may be about to read or write: it is whole or not there."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).rename(path)
    except OSError as error:
        _log.warning("a compiled kernel is not kept: %s", error)


@cache
def _architecture(device: torch.device) -> str:
    """Returns the name of the device's own, with what only Hopper has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


@cache
def _attributes(cluster: int, *, overlapped: bool) -> list[Any]:
    from cuda.bindings import driver  # noqa: PLC0415 - not everywhere

    ids = driver.CUlaunchAttributeID
    attributes = []
    if overlapped:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = 1, cluster, 1
        attributes.append(attribute)
    return attributes


@lru_cache(_MAX_MAPS)
def _tensor_map(address: int, num_lines: int, num_bytes: int, box: Box) -> TensorMap:
    """A map says where and how large a matrix is, not what it holds, so it stays right."""
    from cuda.bindings import driver  # noqa: PLC0415 - not everywhere

    swizzles = driver.CUtensorMapSwizzle
    encoded = _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            address,
            [driver.cuuint64_t(num_bytes), driver.cuuint64_t(num_lines)],
            [driver.cuuint64_t(num_bytes)],
            [driver.cuuint32_t(box.line_bytes), driver.cuuint32_t(box.num_lines)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            {
                64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
                128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
            }[box.line_bytes],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return TensorMap.from_buffer_copy(
        ctypes.string_at(int(encoded.getPtr()), ctypes.sizeof(TensorMap))
    )


def _checked(result: tuple[Any, ...]) -> Any:  # noqa: ANN401 - whatever the call returns
    """Returns what a call gave beside its status. Raises CudaError."""
    status, *values = result
    if int(status) != 0:
        raise CudaError(f"{type(status).__name__} {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
