"""Frames: encoding messages and decoding what a peer sent, with bounds."""

from __future__ import annotations

import msgspec

from tokenloom.wire.messages import ToCore, ToWorker

MAX_FRAME_BYTES = 256 * 1024 * 1024
"""Larger frames are refused before they are parsed."""


class FrameError(ValueError):
    """A frame is garbage, truncated, oversized or of a wrong type."""


_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_core: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)


def encode(message: ToWorker | ToCore) -> bytes:
    """Returns the frame of a message."""
    return _encoder.encode(message)


def decode_to_worker(frame: bytes | memoryview) -> ToWorker:
    """Returns the message that the core sent. Raises FrameError."""
    _check_size(frame)
    try:
        return _to_worker.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(str(error)) from error


def decode_to_core(frame: bytes | memoryview) -> ToCore:
    """Returns the message that a worker sent. Raises FrameError."""
    _check_size(frame)
    try:
        return _to_core.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(str(error)) from error


def _check_size(frame: bytes | memoryview) -> None:
    size = len(frame)
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"frame has {size} bytes; at most {MAX_FRAME_BYTES} are accepted")
