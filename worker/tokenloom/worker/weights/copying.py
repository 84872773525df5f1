"""Copies tensors from their files to a device in threads, while kernels are prepared.

    file, in page cache ── read ──▶ stage: a pinned buffer a thread ── put ──▶ place
    └───── pieces of at most STAGE_BYTES, in the order of the files ─────┘

To put a piece is to copy it, or to quantize it on the device: never is more than a stage a
thread there in another form than the final one. Reading and putting let go of the interpreter.
A file is read, not mapped: a page fault for every 4 KiB costs more than the copy, and a file
that turns out too short is an error, not a SIGBUS.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import torch

from tokenloom.worker.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from tokenloom.worker.weights.filling import Filling, Piece
    from tokenloom.worker.weights.stored import StoredTensor

STAGE_BYTES = 16 * 1024 * 1024
MAX_THREADS = 8
_REPORT_S = 0.1
TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_ALIGNMENT = 8
"""Bytes of the largest type."""


class Copying:
    """The filling of places with what is stored, begun at once.

    To be used with `with`, whose end stops the threads, done or not.
    """

    def __init__(
        self,
        fillings: Iterable[Filling],
        device: torch.device,
        *,
        num_threads: int | None = None,
    ) -> None:
        """Until `wait` returned nothing else may write to the places; reading finds old or new."""
        self._device = device
        if num_threads is None:
            # One thread reads as fast as a CPU converts, which takes threads of its own.
            num_threads = 1 if device.type == "cpu" else min(MAX_THREADS, os.cpu_count() or 1)
        pieces = [piece for each in fillings for piece in each.pieces(STAGE_BYTES, device)]
        self.num_bytes = sum(piece.num_bytes for piece in pieces)
        self._stage_bytes = max((_staged_bytes(piece) for piece in pieces), default=0)
        self.seconds = 0.0
        """From the start until the last piece, once all are copied."""
        self._num_done_bytes = 0
        self._left = iter(pieces)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._start_s = time.perf_counter()
        if device.type == "cuda":
            # What ran there before may still use memory that is a place now.
            torch.cuda.synchronize(device)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="copying")
        self._futures = [self._threads.submit(self._copy) for _ in range(num_threads)]

    def wait(self, report: Callable[[float], None]) -> None:
        """Returns when all is copied; meanwhile tells the fraction that is done.

        Raises:
            CheckpointError: A file cannot be read.
        """
        unfinished = set(self._futures)
        while unfinished:
            report(self._num_done_bytes / self.num_bytes if self.num_bytes else 0.0)
            finished, unfinished = wait(unfinished, _REPORT_S, FIRST_EXCEPTION)
            for future in finished:
                future.result()
        report(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads.shutdown()

    def _copy(self) -> None:
        """Copies pieces until there is none; a thread's work."""
        is_cuda = self._device.type == "cuda"
        with ExitStack() as stack:
            # Each thread has its own current stream and its own mode.
            stack.enter_context(torch.inference_mode())
            if is_cuda:
                stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
                stack.enter_context(torch.cuda.stream(stream))
            stage = torch.empty(self._stage_bytes, dtype=torch.uint8, pin_memory=is_cuda)
            files = _Files(stack)
            while (piece := self._next()) is not None:
                piece.put(*_staged(piece, stage, files))
                if is_cuda:
                    stream.synchronize()
                self._finish(piece)

    def _next(self) -> Piece | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._left, None)

    def _finish(self, piece: Piece) -> None:
        with self._lock:
            self._num_done_bytes += piece.num_bytes
            self.seconds = time.perf_counter() - self._start_s


class _Files:
    """A thread's open files."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._descriptors: dict[Path, int] = {}

    def descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            self._stack.callback(os.close, descriptor)
            self._descriptors[path] = descriptor
        return self._descriptors[path]


def _staged_bytes(piece: Piece) -> int:
    """Returns what a piece takes in a stage, where each source begins on a whole number."""
    return sum(source.num_bytes + -source.num_bytes % _ALIGNMENT for source in piece.sources)


def _staged(piece: Piece, stage: Tensor, files: _Files) -> Iterator[Tensor]:
    """Reads the sources of a piece. Raises CheckpointError."""
    offset = 0
    for source in piece.sources:
        buffer = stage[offset : offset + source.num_bytes]
        _read(files.descriptor(source.path), buffer, source)
        yield buffer.view(TORCH_TYPES[source.dtype]).view(source.shape)
        offset += source.num_bytes + -source.num_bytes % _ALIGNMENT


def _read(descriptor: int, buffer: Tensor, source: StoredTensor) -> None:
    """Fills uint8 [num_bytes]. Raises CheckpointError."""
    view = buffer.numpy().data
    begin = 0
    for offset, num_bytes in source.runs():
        run = view[begin : begin + num_bytes]
        begin += num_bytes
        num_read = 0
        while num_read < num_bytes:
            try:
                num_new = os.preadv(descriptor, [run[num_read:]], offset + num_read)
            except OSError as error:
                raise CheckpointError(f"{source.path} cannot be read: {error}") from error
            if num_new == 0:
                end = offset + num_bytes
                raise CheckpointError(f"{source.path} cannot be read: it ends before byte {end}")
            num_read += num_new
