"""Which attention backend serves a model on a device, and a step's spans: decided here alone.

device                              steps' spans of one token   all others
Hopper, Blackwell, flash-attn-4     decode (Triton)             flash4
from Ampere on, flash-attn 2        decode (Triton)             flash2
any other GPU                       decode (Triton)             paged (Triton)
CPU                                 reference (torch)           reference (torch)

Keys and values in 8 bits are widened for flash-attn; all others read them as they are.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from tokenloom.worker.attention.flash import (
    FlashAttention2,
    FlashAttention4,
    why_not_flash2,
    why_not_flash4,
)
from tokenloom.worker.attention.reference import ReferenceAttention
from tokenloom.worker.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor

    from tokenloom.worker.attention.base import Attention, Decoding, Pages, Spans

_log = logging.getLogger(__name__)


def choose_attention(
    name: str,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    num_widened: int | None = None,
) -> Attention:
    """Returns the backend called `name`, or with `auto` the fastest that works here.

    Args:
        name: One of ATTENTION_NAMES; what is asked for by name serves all spans.
        head_dim: Of the model.
        dtype: Of queries, keys and values.
        device: Where they are.
        num_widened: Keys and values are codes, of which so many positions may be widened at
            once; None: they are of `dtype`.

    Raises:
        LoadError: The backend asked for by name does not work here.
    """
    obstacles = {
        "flash4": why_not_flash4(head_dim=head_dim, dtype=dtype, device=device),
        "flash2": why_not_flash2(head_dim=head_dim, dtype=dtype, device=device),
        "triton": _why_not_triton(device),
        "torch": None,
    }  # the fastest first
    if num_widened is not None:
        for each in ("flash4", "flash2"):  # Triton widens for them
            obstacles[each] = obstacles[each] or obstacles["triton"]
    if name == "auto":
        chosen = next(each for each, obstacle in obstacles.items() if obstacle is None)
        if device.type == "cuda":
            _tell(chosen, obstacles)
    else:
        chosen = name
        if (obstacle := obstacles[name]) is not None:
            raise LoadError(f"attention {name} is not possible: {obstacle}")
    if chosen == "torch":
        return ReferenceAttention()
    if obstacles["triton"] is not None:
        return _flash(chosen)
    # Triton may be absent.
    from tokenloom.worker.attention import decode, paged, widened  # noqa: PLC0415

    if chosen == "triton":
        others: Attention = paged.PagedAttention()
    elif num_widened is None:
        others = _flash(chosen)
    else:
        others = widened.WidenedAttention(_flash(chosen), num_widened)
    if name in {"flash4", "flash2"}:
        return others
    return SplitAttention(decode.PagedDecoding(), others)


def _flash(name: str) -> Attention:
    return FlashAttention4() if name == "flash4" else FlashAttention2()


def _why_not_triton(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def _tell(chosen: str, obstacles: dict[str, str | None]) -> None:
    """Logs why no faster backend was chosen on a GPU."""
    for name, obstacle in obstacles.items():
        if name == chosen:
            break
        level = logging.WARNING if chosen == "torch" else logging.INFO
        _log.log(level, "attention %s is not possible: %s", name, obstacle)


class SplitAttention:
    """Two backends: one for a step's leading spans of one token, one for those behind.

    flash-attn does not part a decoding request's keys: few requests leave most
    multiprocessors idle, and the longer they are, the longer. In a step with
    prefill as well a decoding request would take a tile that is made for a
    hundred tokens.
    """

    capturable = True

    def __init__(self, decoding: Decoding, others: Attention) -> None:
        """Blocks are as `others` wants them."""
        self.name = others.name
        if decoding.name != others.name:
            self.name += f", {decoding.name} for decodes"
        self.block_size = others.block_size
        self.num_widened = others.num_widened
        self._decoding, self._others = decoding, others

    def load(self) -> None:
        """Imports what is slow to import."""
        self._others.load()

    def attend(
        self, pages: Pages, layer: int, queries: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Returns [num_tokens, num_heads, head_dim] for queries of that shape."""
        if spans.num_decodes == spans.num_spans:
            mixed = torch.empty_like(queries)
        else:
            mixed = self._others.attend(pages, layer, queries, spans.others, window)
        if spans.num_decodes:
            self._decoding.attend(pages, layer, queries, spans.decodes, window, mixed)
        return mixed
