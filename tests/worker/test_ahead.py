"""What is compiled ahead is what steps launch: recorded on the meta device, nothing compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.worker.checkpoints import make_checkpoint
from tests.worker.driver import Driver, configuration, int32
from tests.worker.random_load import MAX_STEP_TOKENS, NUM_SLOTS, RandomLoad
from tokenloom.wire.messages import Ready, Step, StepDone
from tokenloom.worker.attention.reference import ReferenceAttention
from tokenloom.worker.loading import LoadedModel
from tokenloom.worker.options import WorkerOptions
from tokenloom.worker.ranks.group import Group
from tokenloom.worker.runner import ModelRunner
from tokenloom.worker.steps.computing import Rows, compute
from tokenloom.worker.steps.graphs import StepGraphs
from tokenloom.worker.steps.shapes import Computed, FixedSteps
from tokenloom.worker.steps.slots import Limits, Slots

if TYPE_CHECKING:
    from tokenloom.worker.attention import Attention
    from tokenloom.worker.steps.ahead import Launch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

META = torch.device("meta")


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks for its driver, of which there is none without a GPU; kernels are Hopper's."""
    from triton.runtime.driver import driver

    from tokenloom.worker.kernels import overlap

    monkeypatch.setattr(driver, "_active", object())
    monkeypatch.setattr(overlap, "generation", lambda _: 9)
    monkeypatch.setattr("tokenloom.worker.kernels.streamed.generation", lambda _: 9)


def recorded() -> AbstractContextManager[dict[Launch, None]]:
    from triton.backends.compiler import GPUTarget

    from tokenloom.worker.steps.ahead import recorded_launches

    return recorded_launches(GPUTarget("cuda", 90, 32))


def on_a_gpu(folder: Path, name: str, kv_cache: str) -> tuple[LoadedModel, Limits, Ready]:
    """Returns the outline of a model whose kernels are a GPU's.

    Those of prompts are without flash-attn, or with the KV cache in 8 bits for it.
    """
    from tokenloom.worker.attention.choose import SplitAttention
    from tokenloom.worker.attention.decode import PagedDecoding
    from tokenloom.worker.attention.paged import PagedAttention
    from tokenloom.worker.attention.widened import WidenedAttention
    from tokenloom.worker.kernels.fused import FusedOperations

    make_checkpoint(folder, name)
    runner = ModelRunner(WorkerOptions(device="cpu", kv_cache_bytes=4 * 1024 * 1024))
    configure = configuration(
        str(folder),
        dtype="bfloat16",
        kv_cache=kv_cache,
        max_num_requests=NUM_SLOTS,
        max_step_tokens=MAX_STEP_TOKENS,
    )
    ready = runner.configure(configure, lambda *_: None)
    loaded, rows = runner._loaded, runner._rows
    assert loaded is not None
    assert rows is not None
    loaded.decoder.operations = FusedOperations()
    others: Attention = PagedAttention(loaded.attention.block_size)
    if kv_cache == "fp8":
        others = WidenedAttention(others, 1000)
    attention = SplitAttention(PagedDecoding(), others)
    return replace(loaded, attention=attention).outline(), rows.limits, ready


def among(loaded: LoadedModel, num_ranks: int) -> LoadedModel:
    """Returns a rank's outline; its group sums on boards what is small."""
    ranks = Group(rank=1, num_ranks=num_ranks, device=META)
    ranks.prepare(NUM_SLOTS, loaded.config.hidden_size, torch.bfloat16)
    return loaded.among(ranks)


class Uncaptured(StepGraphs):
    """Computes what was placed where a graph would be replayed."""

    def _replay(self, shape: object, num_rows: int) -> Computed:
        return self._steps.compute(shape).first(num_rows)  # type: ignore[arg-type]


def answering(loaded: LoadedModel, limits: Limits, *, fixed: bool) -> Callable[[Step], StepDone]:
    """Returns what computes steps, in fixed shapes or as they come; all tokens are zero."""
    rows, slots = Rows.empty(limits, loaded.decoder, META), Slots(limits)
    if fixed:
        steps = FixedSteps(loaded, rows.batch, rows.sampler, limits)
        rows = replace(rows, graphs=Uncaptured(steps, META))

    def answer(step: Step) -> StepDone:
        compute(slots.apply(step), loaded, rows, slots)
        return StepDone(
            epoch=step.epoch,
            step_id=step.step_id,
            tokens=int32([0] * sum(step.span_samples)),
            logprobs=(),
            faulty_rows=b"",
            compute_s=0.0,
        )

    return answer


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("name", "kv_cache", "num_ranks"),
    [
        ("llama", "auto", 1),
        ("qwen3", "auto", 1),
        ("qwen2-window", "auto", 1),
        ("llama", "fp8", 1),
        ("llama", "auto", 2),
    ],
)
def test_steps_launch_nothing_that_was_not_compiled_ahead(
    tmp_path: Path, name: str, kv_cache: str, num_ranks: int, *, fixed: bool
) -> None:
    from tokenloom.worker.steps.ahead import launch_all

    with torch.inference_mode():
        loaded, limits, ready = on_a_gpu(tmp_path, name, kv_cache)
        if num_ranks > 1:
            loaded = among(loaded, num_ranks)
        with recorded() as ahead:
            launch_all(loaded, limits)
        with recorded() as launched:
            driver = Driver(answering(loaded, limits, fixed=fixed), ready)
            completions = RandomLoad(driver, 1, edits=True).run(45)
    assert len(completions) > 20
    assert list(launched)
    assert [each for each in launched if each not in ahead] == []


def test_a_layer_of_each_window_is_launched(tmp_path: Path) -> None:
    with torch.inference_mode():
        loaded, _, _ = on_a_gpu(tmp_path, "qwen2-window", "auto")
    windows = loaded.decoder._config.windows
    assert len(windows) == 2
    assert set(windows) == {None, 9}


def test_what_attention_in_torch_launches_is_found_too(tmp_path: Path) -> None:
    from tokenloom.worker.steps.ahead import launch_all

    with torch.inference_mode():
        loaded, limits, _ = on_a_gpu(tmp_path, "llama", "auto")
        with recorded() as launches:
            launch_all(replace(loaded, attention=ReferenceAttention()), limits)
    assert any("place_heads" in each.kernel.fn.__name__ for each in launches)


@pytest.mark.parametrize(("kv_cache", "num_ranks"), [("auto", 1), ("fp8", 1), ("auto", 2)])
def test_all_that_steps_launch_compiles_for_hopper_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kv_cache: str, num_ranks: int
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from tokenloom.worker.steps import ahead

    class Apart(ahead._NoDevice):
        """Another device's kernels, so that those of other tests' stay uncompiled."""

        def get_current_device(self) -> str:
            return f"apart, {kv_cache} {num_ranks}"

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    with torch.inference_mode():
        loaded, limits, _ = on_a_gpu(tmp_path, "qwen3", kv_cache)
        if num_ranks > 1:
            loaded = among(loaded, num_ranks)
        with recorded() as launches:
            ahead.launch_all(loaded, limits)
    driver.set_active(Apart(GPUTarget("cuda", 90, 32)))
    compiled = [each.kernel.preload(each.specialization) for each in launches]
    assert len(compiled) > 20
    summing = [each for each in launches if each.kernel.fn.__name__ == "_sum_add_norm"]
    assert bool(summing) == (num_ranks > 1)
    assert max(each.metadata.shared for each in compiled) <= 113 * 1024  # two on a multiprocessor
