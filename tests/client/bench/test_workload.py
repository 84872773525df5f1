import random
from pathlib import Path

import pytest

from tokenloom.client.bench.load import poisson_arrivals
from tokenloom.client.bench.workload import (
    CASES,
    Endless,
    Lengths,
    Listed,
    WorkloadError,
    random_requests,
    read_requests,
)


def plain(listed: Listed) -> tuple[list[list[int]], list[int | None]]:
    return (
        [[int(each) for each in request.prompt] for request in listed.requests],
        [request.max_tokens for request in listed.requests],
    )


def mixed(n: int, low: int, high: int, seed: int, vocab: int) -> tuple[list[list[int]], list[int]]:
    """The comparison's own way to draw requests of many lengths, written down once more."""
    draws = random.Random(seed)
    prompts = []
    for _ in range(n):
        length = draws.randint(low, high)
        prompts.append([draws.randrange(vocab) for _ in range(length)])
    return prompts, [draws.randint(low, high) for _ in range(n)]


def fixed(n: int, num_in: int, num_out: int) -> tuple[list[list[int]], list[int]]:
    draws = random.Random(11)
    ids = [draws.randrange(100_000) for _ in range(n * num_in)]
    return [ids[start : start + num_in] for start in range(0, n * num_in, num_in)], [num_out] * n


def test_named_case_of_many_lengths_is_the_workload_of_the_comparison() -> None:
    assert plain(CASES["mixed256"].requests()) == mixed(256, 100, 1024, 7, 100_000)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("b1", (1, 1024, 256)),
        ("b32", (32, 1024, 256)),
        ("b128", (128, 512, 256)),
        ("prefill", (16, 8192, 1)),
        ("long1", (1, 32768, 64)),
    ],
)
def test_named_case_of_one_length_is_the_workload_of_the_comparison(
    name: str, shape: tuple[int, int, int]
) -> None:
    assert plain(CASES[name].requests()) == fixed(*shape)


def test_random_requests_with_a_cases_parameters_are_the_cases() -> None:
    drawn = random_requests(
        8, prompt_tokens=Lengths(3, 9), output_tokens=Lengths(3, 9), vocab_size=50, seed=7
    )
    assert plain(drawn) == mixed(8, 3, 9, 7, 50)


def test_endless_requests_depend_on_seed_and_index_alone() -> None:
    source = Endless(
        prompt_tokens=Lengths(2, 9), output_tokens=Lengths(5, 5), vocab_size=30, seed=3
    )
    again = Endless(prompt_tokens=Lengths(2, 9), output_tokens=Lengths(5, 5), vocab_size=30, seed=3)
    first = [source.request(index) for index in range(50)]
    assert [again.request(index) for index in reversed(range(50))] == first[::-1]
    assert {len(request.prompt) for request in first} == set(range(2, 10))
    assert {request.max_tokens for request in first} == {5}
    assert all(0 <= int(each) < 30 for request in first for each in request.prompt)
    assert len({tuple(request.prompt) for request in first}) == 50


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("7", Lengths(7, 7)), ("1:1", Lengths(1, 1)), ("100:1024", Lengths(100, 1024))],
)
def test_lengths_are_a_number_or_a_range(text: str, lengths: Lengths) -> None:
    assert Lengths.parse(text) == lengths


@pytest.mark.parametrize("text", ["x", "0", "5:4", "3:", ":3", "1:2:3", "1.5"])
def test_other_lengths_are_refused_with_what_was_given(text: str) -> None:
    with pytest.raises(WorkloadError, match=text):
        Lengths.parse(text)


def test_lines_of_a_file_are_texts_ids_or_objects(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '"one"\n[1, 2]\n\n{"text": "two", "max_tokens": 3}\n{"token_ids": [4]}\n{"prompt": "é"}\n',
        encoding="utf-8",
    )
    listed = read_requests(path, max_tokens=9)
    assert [
        (each.prompt if isinstance(each.prompt, str) else list(each.prompt), each.max_tokens)
        for each in listed.requests
    ] == [("one", 9), ([1, 2], 9), ("two", 3), ([4], 9), ("é", 9)]
    assert listed.request(6) == listed.request(1)


@pytest.mark.parametrize(
    "line",
    [
        "3",
        "{}",
        "[]",
        "[true]",
        '["a"]',
        "[-1]",
        '{"text": "a", "token_ids": [1]}',
        '{"text": "a", "max_tokens": 0}',
        "{",
    ],
)
def test_other_lines_are_refused_with_their_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    with pytest.raises(WorkloadError, match=r"prompts\.jsonl:2: "):
        read_requests(path, max_tokens=None)


def test_file_without_requests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(WorkloadError, match="has no requests"):
        read_requests(tmp_path / "empty.jsonl", max_tokens=None)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_their_law() -> None:
    arrivals = poisson_arrivals(4.0, num_requests=20_000, end_s=None, seed=1)
    gaps = [after - before for before, after in zip((0.0, *arrivals), arrivals, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.25, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)  # as an exponential's
    assert all(gap >= 0 for gap in gaps)


def test_arrivals_end_with_their_number_or_their_time() -> None:
    assert len(poisson_arrivals(9.0, num_requests=7, end_s=None, seed=2)) == 7
    until = poisson_arrivals(9.0, num_requests=None, end_s=10.0, seed=2)
    assert until[:7] == poisson_arrivals(9.0, num_requests=7, end_s=None, seed=2)
    assert until[-1] < 10.0
    assert until != poisson_arrivals(9.0, num_requests=None, end_s=10.0, seed=3)
    with pytest.raises(ValueError, match="need an end"):
        poisson_arrivals(9.0, num_requests=None, end_s=None, seed=2)
