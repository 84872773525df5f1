"""Distributions against the exact ones, parameter by parameter, and a draw's independence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from tests.worker.driver import sampling
from tokenloom.wire.messages import SamplingParams
from tokenloom.worker.drawing.twin import exponential
from tokenloom.worker.errors import ProtocolError
from tokenloom.worker.steps.batch import SampleRows
from tokenloom.worker.steps.sampling import Sampled, Sampler
from tokenloom.worker.steps.slots import Admitted

VOCAB_SIZE = 20
NUM_DRAWS = 20_000
PROMPT = [3, 3, 5, 7]
COMPLETION = [5, 9, 9, 9]
HISTORY = PROMPT + COMPLETION

Float64Array = npt.NDArray[np.float64]


def logits_of(seed: int = 0) -> Float64Array:
    return np.random.default_rng(seed).normal(0, 1.5, VOCAB_SIZE)


def admissions(
    params: Sequence[SamplingParams],
    slots: Iterable[int],
    *,
    history: Sequence[int] = HISTORY,
    num_prompt: int = len(PROMPT),
) -> list[Admitted]:
    return [
        Admitted(
            slot=int(slot),
            tokens=np.array(history, dtype=np.int32),
            num_prompt_tokens=num_prompt,
            num_computed=0,
            sampling=each,
        )
        for slot, each in zip(slots, params, strict=True)
    ]


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    *,
    positions: Sequence[int] | None = None,
    history: Sequence[int] = HISTORY,
    num_prompt: int = len(PROMPT),
) -> Sampled:
    """Samples a row for each of `params`, in slots of a shuffled order."""
    num_rows, device = len(params), logits.device
    slots = np.random.default_rng(num_rows).permutation(num_rows).astype(np.int32)
    ends = np.array(positions or [len(history)] * num_rows, dtype=np.int32)
    tokens = torch.zeros((num_rows, len(history) + 1), dtype=torch.int32, device=device)
    tokens[:, : len(history)] = torch.tensor(list(history), dtype=torch.int32)
    sampler = Sampler(num_rows, logits.shape[1], device)
    sampler.admit(admissions(params, slots, history=history, num_prompt=num_prompt))
    rows = SampleRows(
        slots=torch.from_numpy(slots).long().to(device),
        ends=torch.from_numpy(ends).long().to(device),
        host_slots=slots,
        host_ends=ends,
    )
    return sampler.sample(logits.clone(), rows, tokens, np.full(num_rows, num_prompt, np.int32))


def softmax(logits: Float64Array) -> Float64Array:
    return normalized(np.exp(logits - logits.max()))


def normalized(weights: Float64Array) -> Float64Array:
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def penalized(
    logits: Float64Array, *, repetition: float = 1, presence: float = 0, frequency: float = 0
) -> Float64Array:
    logits = logits.copy()
    for token in set(HISTORY):
        logits[token] *= 1 / repetition if logits[token] > 0 else repetition
    for token in COMPLETION:
        logits[token] -= frequency
    for token in set(COMPLETION):
        logits[token] -= presence
    return logits


def top_k(probs: Float64Array, k: int) -> Float64Array:
    return normalized(np.where(probs >= np.sort(probs)[-k], probs, 0))


def top_p(probs: Float64Array, p: float) -> Float64Array:
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]
    kept = np.zeros_like(probs)
    kept[order[before < p]] = probs[order[before < p]]
    return normalized(kept)


def min_p(probs: Float64Array, p: float) -> Float64Array:
    return normalized(np.where(probs >= p * probs.max(), probs, 0))


def biased(logits: Float64Array, *biases: tuple[int, float]) -> Float64Array:
    logits = logits.copy()
    for token, bias in biases:
        logits[token] += bias
    return logits


LOGITS = logits_of()
CASES: dict[str, tuple[dict[str, object], Float64Array]] = {
    "temperature 1": ({"temperature": 1.0}, softmax(LOGITS)),
    "temperature 0.5": ({"temperature": 0.5}, softmax(LOGITS / 0.5)),
    "temperature 2": ({"temperature": 2.0}, softmax(LOGITS / 2)),
    "top_k": ({"temperature": 1.0, "top_k": 5}, top_k(softmax(LOGITS), 5)),
    "top_k over all": ({"temperature": 1.0, "top_k": 1000}, softmax(LOGITS)),
    "top_p": ({"temperature": 1.0, "top_p": 0.7}, top_p(softmax(LOGITS), 0.7)),
    "top_p after temperature": (
        {"temperature": 2.0, "top_p": 0.6},
        top_p(softmax(LOGITS / 2), 0.6),
    ),
    "top_p of a hair": ({"temperature": 1.0, "top_p": 1e-6}, top_k(softmax(LOGITS), 1)),
    "min_p": ({"temperature": 1.0, "min_p": 0.1}, min_p(softmax(LOGITS), 0.1)),
    "top_k, top_p and min_p": (
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.08},
        min_p(top_p(top_k(softmax(LOGITS / 1.5), 12), 0.9), 0.08),
    ),
    "repetition_penalty": (
        {"temperature": 1.0, "repetition_penalty": 1.7},
        softmax(penalized(LOGITS, repetition=1.7)),
    ),
    "presence_penalty": (
        {"temperature": 1.0, "presence_penalty": 1.2},
        softmax(penalized(LOGITS, presence=1.2)),
    ),
    "frequency_penalty": (
        {"temperature": 1.0, "frequency_penalty": 0.6},
        softmax(penalized(LOGITS, frequency=0.6)),
    ),
    "negative penalties": (
        {"temperature": 1.0, "presence_penalty": -0.7, "frequency_penalty": -0.3},
        softmax(penalized(LOGITS, presence=-0.7, frequency=-0.3)),
    ),
    "logit_bias": (
        {"temperature": 1.0, "logit_bias": ((2, 1.5), (4, -100.0), (5, -0.5))},
        softmax(biased(LOGITS, (2, 1.5), (4, -100.0), (5, -0.5))),
    ),
    "min_tokens": (
        {"temperature": 1.0, "min_tokens": 5, "stop_token_ids": (1, 8, 10**6)},
        softmax(biased(LOGITS, (1, -np.inf), (8, -np.inf))),
    ),
    "min_tokens reached": (
        {"temperature": 1.0, "min_tokens": 4, "stop_token_ids": (1, 8)},
        softmax(LOGITS),
    ),
    "all at once": (
        {
            "temperature": 0.8,
            "top_k": 15,
            "top_p": 0.95,
            "min_p": 0.02,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.2,
            "logit_bias": ((0, 1.0),),
        },
        min_p(
            top_p(
                top_k(
                    softmax(
                        biased(
                            penalized(LOGITS, repetition=1.3, presence=0.4, frequency=0.2),
                            (0, 1.0),
                        )
                        / 0.8
                    ),
                    15,
                ),
                0.95,
            ),
            0.02,
        ),
    ),
}


def draw_counts(
    options: dict[str, object], logits: Float64Array, device: str = "cpu"
) -> npt.NDArray[np.int64]:
    params = [sampling(seed=seed, **options) for seed in range(NUM_DRAWS)]  # type: ignore[arg-type]
    rows = torch.from_numpy(logits).float().repeat(NUM_DRAWS, 1).to(device)
    drawn = sample(rows, params).tokens
    return np.bincount(drawn.cpu().numpy(), minlength=VOCAB_SIZE)


def p_value(counts: npt.NDArray[np.int64], probs: Float64Array) -> float:
    """Returns the chi-square test's, classes of few expected draws taken together."""
    expected = probs * NUM_DRAWS
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    if len(expected) == 1:
        return 1.0
    return float(stats.chisquare(observed, expected).pvalue)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    options, probs = CASES[name]
    counts = draw_counts(options, LOGITS)
    assert not counts[probs == 0].any()
    # Seeds are fixed, so this passes always or never; by chance one in 10,000 would not.
    assert p_value(counts, probs) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_chi_square_test_would_notice_another_distribution(name: str) -> None:
    options, _ = CASES[name]
    _, wrong = CASES["temperature 1" if "0.5" in name else "temperature 0.5"]
    if "hair" not in name:
        assert p_value(draw_counts(options, LOGITS), normalized(wrong + 1e-9)) < 1e-9


def test_draws_at_successive_positions_of_one_seed_follow_the_distribution() -> None:
    params = [sampling(temperature=1.0, seed=42)] * NUM_DRAWS
    rows = torch.from_numpy(LOGITS).float().repeat(NUM_DRAWS, 1)
    drawn = sample(rows, params, positions=range(8, 8 + NUM_DRAWS)).tokens
    counts = np.bincount(drawn.numpy(), minlength=VOCAB_SIZE)
    assert p_value(counts, softmax(LOGITS)) > 1e-4


def test_a_draw_depends_on_its_seed_position_and_logits_alone() -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 2, (64, 1000))).float()
    params = [
        sampling(
            temperature=float(rng.choice([0.0, 0.7, 1.0, 1.8])),
            top_k=int(rng.choice([0, 1, 40])),
            top_p=float(rng.choice([1.0, 0.9])),
            min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            frequency_penalty=float(rng.choice([0.0, 0.5])),
            seed=int(rng.integers(0, 2**63)),
        )
        for _ in range(64)
    ]
    positions = [int(position) for position in rng.integers(8, 500, 64)]
    together = sample(logits, params, positions=positions).tokens
    alone = [
        sample(logits[row : row + 1], params[row : row + 1], positions=positions[row : row + 1])
        for row in range(64)
    ]
    assert together.tolist() == [int(each.tokens) for each in alone]


def test_seeds_of_64_bits_differ_in_every_bit() -> None:
    seeds = torch.tensor([0, *(1 << bit for bit in range(63)), -(1 << 63)])
    numbers = exponential(seeds, torch.zeros_like(seeds), 8)
    assert len({tuple(row) for row in numbers.tolist()}) == 65


def test_the_exponential_numbers_are_of_the_exponential_distribution() -> None:
    seeds, positions = torch.arange(50), torch.arange(50) * 7
    numbers = exponential(seeds, positions, 2001).flatten().double().numpy()
    assert numbers.min() > 0
    assert np.isfinite(numbers).all()
    assert stats.kstest(numbers, "expon").pvalue > 1e-3
    pairs = numbers.reshape(50, 2001)[:, :2000].reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.02


def test_a_temperature_of_zero_takes_the_largest() -> None:
    logits = torch.from_numpy(np.stack([logits_of(seed) for seed in range(50)])).float()
    drawn = sample(logits, [sampling(seed=seed) for seed in range(50)]).tokens
    assert drawn.tolist() == logits.argmax(-1).tolist()


def test_greedy_and_random_rows_share_a_step() -> None:
    logits = torch.from_numpy(LOGITS).float().repeat(40, 1)
    params = [sampling(temperature=float(row % 2) * 3, seed=row) for row in range(40)]
    drawn = sample(logits, params).tokens.tolist()
    assert set(drawn[::2]) == {int(LOGITS.argmax())}
    assert len(set(drawn[1::2])) > 3


def test_a_row_is_plain_when_it_needs_no_edit_and_no_logprobs() -> None:
    params = {
        0: sampling(),
        1: sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, stop_token_ids=(2,)),
        2: sampling(presence_penalty=0.1),
        3: sampling(frequency_penalty=0.1),
        4: sampling(repetition_penalty=1.1),
        5: sampling(logit_bias=((3, 1.0),)),
        6: sampling(num_top_logprobs=0),
        7: sampling(min_tokens=2, stop_token_ids=(2,)),
        8: sampling(min_tokens=2),
    }
    sampler = Sampler(9, VOCAB_SIZE, torch.device("cpu"))
    sampler.admit(admissions(list(params.values()), params))
    too_short, long_enough = len(PROMPT) + 1, len(PROMPT) + 2

    def plain_at(end: int) -> set[int]:
        ends = np.array([end], dtype=np.int32)
        return {slot for slot in params if sampler.is_plain(np.array([slot], np.int32), ends)}

    assert plain_at(too_short) == {0, 1, 8}
    assert plain_at(long_enough) == {0, 1, 7, 8}
    assert not sampler.is_plain(np.array([0, 2], np.int32), np.array([9, 9], np.int32))
    sampler.admit(admissions([sampling()], [2]))
    assert sampler.is_plain(np.array([0, 2], np.int32), np.array([9, 9], np.int32))


def test_logits_of_the_models_own_type_are_drawn_from_as_they_are() -> None:
    logits = torch.from_numpy(LOGITS).repeat(200, 1).bfloat16()
    params = [
        sampling(temperature=row % 3, top_k=row % 5, top_p=0.9, seed=row) for row in range(200)
    ]
    narrow = sample(logits, params)
    assert narrow.tokens.tolist() == sample(logits.float(), params).tokens.tolist()
    edited = [*params[:-1], sampling(num_top_logprobs=2)]
    assert sample(logits, edited).tokens[:-1].tolist() == narrow.tokens[:-1].tolist()


def test_logprobs_are_those_after_penalties_and_before_temperature() -> None:
    params = [
        sampling(),
        sampling(temperature=0.3, presence_penalty=1.2, num_top_logprobs=4, seed=1, top_k=2),
        sampling(num_top_logprobs=0),
    ]
    sampled = sample(torch.from_numpy(LOGITS).float().repeat(3, 1), params)
    logprobs = sampled.logprobs
    assert logprobs is not None
    assert logprobs.rows.tolist() == [1, 2]
    assert logprobs.num_top.tolist() == [4, 0]
    exact = np.log(softmax(penalized(LOGITS, presence=1.2)))
    assert float(logprobs.drawn[0]) == pytest.approx(exact[int(sampled.tokens[1])], abs=1e-5)
    assert logprobs.top_ids[0].tolist() == np.argsort(-exact)[:4].tolist()
    assert logprobs.top[0].tolist() == pytest.approx(np.sort(exact)[::-1][:4], abs=1e-5)
    assert float(logprobs.drawn[1]) == pytest.approx(np.log(softmax(LOGITS)).max(), abs=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(poison: float) -> None:
    logits = torch.from_numpy(LOGITS).float().repeat(5, 1)
    params = [sampling(temperature=1.0, seed=row, top_p=0.9) for row in range(5)]
    healthy = sample(logits, params)
    logits[2, 11] = poison
    sampled = sample(logits, params)
    assert sampled.faulty.tolist() == [False, False, True, False, False]
    expected = healthy.tokens.tolist()
    expected[2] = 0
    assert sampled.tokens.tolist() == expected


def test_a_fault_is_found_in_a_step_with_edits_and_suppressed_stops_are_none() -> None:
    logits = torch.from_numpy(LOGITS).float().repeat(3, 1)
    logits[1, 4] = -torch.inf
    early = sampling(temperature=1.0, top_p=0.9, min_tokens=5, stop_token_ids=(2,), seed=3)
    sampled = sample(logits, [early, sampling(presence_penalty=1.0), early])
    assert sampled.faulty.tolist() == [False, True, False]
    assert int(sampled.tokens[1]) == 0
    assert int(sampled.tokens[0]) == int(sampled.tokens[2]) != 2


def test_equal_logits_at_the_edge_of_top_k_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).repeat(2000, 1)
    params = [sampling(temperature=1.0, top_k=2, seed=seed) for seed in range(2000)]
    assert set(sample(logits, params, history=[0], num_prompt=1).tokens.tolist()) == {0, 1, 2, 3}


def test_a_bias_on_a_token_past_the_vocabulary_is_refused() -> None:
    with pytest.raises(ProtocolError, match="biases token 20; the vocabulary has 20"):
        sample(torch.zeros((1, 20)), [sampling(logit_bias=((20, 1.0),))])
