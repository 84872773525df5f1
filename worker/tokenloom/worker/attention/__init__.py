"""Attention over paged keys and values, behind one Protocol.

`base` says what a backend does, `reference` does it readably in torch (on a CPU,
where no kernel fits, and as the twin in tests), `flash` with flash-attn 4 or 2,
`paged` with a Triton kernel of our own for spans of every length and `decode` with
another for spans of one token; `coded` and `widened` are about keys and values in 8
bits. `choose_attention` is the one place that decides.
"""

from tokenloom.worker.attention.base import Attention, Pages, Scales, Spans
from tokenloom.worker.attention.choose import choose_attention

__all__ = ["Attention", "Pages", "Scales", "Spans", "choose_attention"]
