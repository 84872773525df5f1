"""Which attention backend serves a model on a device: decided here alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tokenloom.worker.attention.flash import FlashAttention, why_not_flash
from tokenloom.worker.attention.reference import ReferenceAttention
from tokenloom.worker.errors import LoadError

if TYPE_CHECKING:
    import torch

    from tokenloom.worker.attention.base import Attention

_log = logging.getLogger(__name__)


def choose_attention(
    name: str, *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Attention:
    """Returns the backend called `name`, or with `auto` the fastest that works here.

    Raises:
        LoadError: The backend asked for by name does not work here.
    """
    obstacle = why_not_flash(head_dim=head_dim, dtype=dtype, device=device)
    if name == "flash" and obstacle is not None:
        raise LoadError(f"attention flash is not possible: {obstacle}")
    if name == "torch" or obstacle is not None:
        if name == "auto" and device.type == "cuda":
            _log.warning("attention without flash-attn-4, slowly: %s", obstacle)
        return ReferenceAttention()
    return FlashAttention()
