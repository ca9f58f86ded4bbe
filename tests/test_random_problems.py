"""Random problems over all features at once, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch

from problems import Problem, check, random_problem

CHUNK = 25


def _check_all(first: int, count: int, device: str) -> None:
    failures = []
    for seed in range(first, first + count):
        try:
            check(random_problem(seed), device)
        except Exception as error:  # every miss is shown, not only the first
            failures.append(f"seed {seed}: {type(error).__name__}: {error}")
    assert not failures, f"{len(failures)} of {count} problems miss\n" + "\n".join(failures[:20])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" not in metafunc.fixturenames:
        return
    count, seed = metafunc.config.getoption("--problems"), metafunc.config.getoption("--seed")
    starts = range(seed, seed + count, CHUNK)
    metafunc.parametrize("first", starts, ids=[f"{start}-{min(start + CHUNK, seed + count) - 1}" for start in starts])


def _size(first: int, request: pytest.FixtureRequest) -> int:
    end = request.config.getoption("--seed") + request.config.getoption("--problems")
    return min(CHUNK, end - first)


def test_random_problems_agree_with_the_reference_on_the_cpu(first: int, request: pytest.FixtureRequest) -> None:
    _check_all(first, _size(first, request), "cpu")


@pytest.mark.gpu
def test_random_problems_agree_with_the_reference_on_cuda(first: int, request: pytest.FixtureRequest) -> None:
    _check_all(first, _size(first, request), "cuda")


def test_a_problem_can_be_reproduced_from_its_repr() -> None:
    problem = random_problem(7)
    assert eval(repr(problem), {"Problem": Problem, "torch": torch}) == problem
