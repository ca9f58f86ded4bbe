"""Random problems over all features at once, forward and backward, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from problems import Problem, check_all
from random_problems import random_masked_problem, random_problem

CHUNK = 25


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" not in metafunc.fixturenames:
        return
    count, seed = metafunc.config.getoption("--problems"), metafunc.config.getoption("--seed")
    starts = range(seed, seed + count, CHUNK)
    metafunc.parametrize("first", starts, ids=[f"{start}-{min(start + CHUNK, seed + count) - 1}" for start in starts])


def _problems(first: int, request: pytest.FixtureRequest) -> list[Problem]:
    end = request.config.getoption("--seed") + request.config.getoption("--problems")
    return [random_problem(seed) for seed in range(first, min(first + CHUNK, end))]


def test_random_problems_agree_with_the_reference_on_the_cpu(first: int, request: pytest.FixtureRequest) -> None:
    check_all(_problems(first, request), "cpu")


@pytest.mark.gpu
def test_random_problems_agree_with_the_reference_on_cuda(first: int, request: pytest.FixtureRequest) -> None:
    check_all(_problems(first, request), "cuda")


@pytest.mark.gpu
def test_random_masks_beside_all_features_on_cuda(first: int, request: pytest.FixtureRequest) -> None:
    end = request.config.getoption("--seed") + request.config.getoption("--problems")
    check_all([random_masked_problem(seed) for seed in range(first, min(first + CHUNK, end))], "cuda")


@pytest.mark.gpu
def test_random_float32_problems_on_cuda(first: int, request: pytest.FixtureRequest) -> None:
    """Several tiles each: float32 has tensor-core kernels of its own."""
    end = request.config.getoption("--seed") + request.config.getoption("--problems")
    seeds = range(first, min(first + CHUNK, end))
    check_all([random_problem(seed, (torch.float32,), max_seqlen=400) for seed in seeds], "cuda")
    check_all([random_masked_problem(seed, dtypes=(torch.float32,)) for seed in seeds], "cuda")


@pytest.mark.gpu
def test_random_float32_problems_of_large_head_dims_on_cuda(first: int, request: pytest.FixtureRequest) -> None:
    """For which there are tensor-core kernels too, with a kernel for each gradient."""
    end = request.config.getoption("--seed") + request.config.getoption("--problems")

    def widened(problem: Problem, seed: int) -> Problem:
        head_dim = 129 + seed * 37 % 128
        return replace(problem, head_dim=head_dim, head_dim_v=head_dim if seed % 2 else 1 + seed * 11 % 256)

    seeds = range(first, min(first + CHUNK, end))
    check_all([widened(random_problem(seed, (torch.float32,), max_seqlen=400), seed) for seed in seeds], "cuda")
    check_all([widened(random_masked_problem(seed, dtypes=(torch.float32,)), seed) for seed in seeds], "cuda")


def test_a_problem_can_be_reproduced_from_its_repr() -> None:
    problem = random_problem(7)
    assert eval(repr(problem), {"Problem": Problem, "torch": torch}) == problem
