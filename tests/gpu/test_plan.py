"""What `tokenloom plan` says of this GPU, beside what a worker on it takes."""

from __future__ import annotations

import gc
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
from tokenloom.worker.weights.formats import format_named

FRACTION = 0.02
"""Of a small model, the whole memory is more blocks than kernels count in 32 bits."""


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("kv_cache", ["auto", "fp8"])
def test_a_worker_takes_the_memory_that_was_planned(
    tmp_path: Path, quantize: str, kv_cache: str
) -> None:
    make_checkpoint(tmp_path, "llama")
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    if total - free > 2 * 1024**3:
        pytest.skip(f"others use {total - free} bytes of this GPU")
    capability = torch.cuda.get_device_capability()
    gpu = Gpu(name="this", memory_bytes=total, datasheet_bytes_per_s=None, capability=capability)
    if kv_cache == "fp8" and not gpu.has_fp8:
        pytest.skip("this GPU has no 8-bit floats")
    runner = ModelRunner(WorkerOptions(device="cuda", graphs=False, kv_memory_fraction=FRACTION))
    configure = configuration(
        str(tmp_path), dtype="bfloat16", quantize=quantize, kv_cache=kv_cache, max_num_requests=64
    )
    ready = runner.configure(configure, lambda *_: None)
    kv_type = "bfloat16" if kv_cache == "auto" else kv_cache
    serving = Serving(
        dtype="bfloat16",
        kv_types=(kv_type,),
        context_tokens=256,
        max_num_requests=64,
        kv_memory_fraction=FRACTION,
    )
    precision = Precision(label=quantize, form=format_named(quantize))
    plan = make_plan(read_checkpoint(str(tmp_path)), serving, (precision,), gpu)
    (row,) = plan.rows
    assert row.weights_bytes == ready.weights_bytes
    assert row.pools[0].num_bytes == pytest.approx(ready.kv_bytes, rel=0.03)
    num_positions = ready.num_blocks * ready.block_size
    assert plan.kv_bytes_per_token[kv_type] * num_positions == ready.kv_bytes
