"""What `tokenloom plan` says of this GPU, beside what a worker on it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.worker.checkpoints import make_checkpoint
from tests.worker.driver import configuration
from tokenloom.worker.gpus import Gpu
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.plan.capacity import Precision, Serving, make_plan
from tokenloom.worker.plan.reading import read_checkpoint
from tokenloom.worker.runner import ModelRunner

FRACTION = 0.05
"""Of a small model, the whole memory is more blocks than kernels count in 32 bits."""


def test_a_worker_takes_the_memory_that_was_planned(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    if total - free > 2 * 1024**3:
        pytest.skip(f"others use {total - free} bytes of this GPU")
    runner = ModelRunner(WorkerOptions(device="cuda", graphs=False, kv_memory_fraction=FRACTION))
    configure = configuration(str(tmp_path), dtype="bfloat16", max_num_requests=64)
    ready = runner.configure(configure, lambda *_: None)
    serving = Serving(
        dtype="bfloat16",
        kv_types=("bfloat16",),
        context_tokens=256,
        max_num_requests=64,
        kv_memory_fraction=FRACTION,
    )
    gpu = Gpu(name="this", memory_bytes=total, datasheet_bytes_per_s=None)
    precision = Precision(label="bfloat16", form=None)
    (row,) = make_plan(read_checkpoint(str(tmp_path)), serving, (precision,), gpu).rows
    assert row.weights_bytes == ready.weights_bytes
    assert row.pools[0].num_bytes == pytest.approx(ready.kv_bytes, rel=0.03)
