"""A tenant that floods the server slows nobody's first tokens, and nobody starves."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulation.fairness import KINDS, first_tokens
from tests.simulation.timed import LLAMA_8B, QWEN_06B, SPEC, Arrival, Costs, limits, run
from tokenloom.scheduler.core.state import State
from tokenloom.scheduler.tenants import Tenant

CASES = [*((LLAMA_8B, kind) for kind in KINDS), (QWEN_06B, "as the steady ones")]


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_a_hundredfold_load_slows_first_tokens_of_others_at_most_by_half(
    shape: Costs, kind: str
) -> None:
    alone, beside_one, beside_flood = (
        first_tokens(shape, KINDS[kind], factor, seed=0)[0] for factor in (0, 1, 100)
    )
    assert np.median(beside_flood) <= 1.5 * np.median(alone)
    assert np.percentile(beside_flood, 95) <= 1.5 * np.percentile(beside_one, 95)


def test_two_tenants_who_both_want_all_are_served_by_their_weights() -> None:
    """Their counters part by little more than what one step computes, whatever their requests."""
    tenants = [Tenant(name="a", weight=3.0), Tenant(name="b", weight=1.0)]
    floods = [
        Arrival(at_s=0.001 * i, num_prompt=length, num_output=300, tenant=name)
        for i in range(900)
        for name, length in (("a", 200), ("b", 900))
    ]
    gaps: list[float] = []
    computed: list[float] = [0.0, 0.0]

    def watch(state: State) -> None:
        lines = [state.waiting.lines.get(name) for name in ("a", "b")]
        if all(line is not None and line.places for line in lines):
            state.settle()
            a, b = (line for line in lines if line is not None)
            gaps.append(abs(a.served - b.served))
            computed[:] = [a.num_computed, b.num_computed]

    run(limits(), LLAMA_8B, floods, tenants=tenants, until_s=20.0, watch=watch)
    assert len(gaps) > 100
    assert max(gaps) <= 2 * SPEC.max_step_tokens
    assert computed[0] / computed[1] == pytest.approx(3.0, rel=0.1)


def test_who_holds_nothing_is_admitted_by_the_next_plan_though_all_slots_are_taken() -> None:
    """The bound of a wait: the steps in flight, and one more."""
    flood = [Arrival(at_s=0.0, num_prompt=100, num_output=4000, tenant="flood") for _ in range(600)]
    late = Arrival(at_s=5.0, num_prompt=100, num_output=2, tenant="late")
    waits: list[int] = []

    def watch(state: State) -> None:
        line = state.waiting.lines.get("late")
        if line is not None and line.places:
            waits.append(state.next_step_id)

    tenants = [Tenant(name="flood"), Tenant(name="late")]
    figures = run(limits(), LLAMA_8B, [*flood, late], tenants=tenants, until_s=6.0, watch=watch)
    assert waits == []
    assert figures.ttft_s[-1] < 0.1
