"""Caches whose values are a part of the keys, as latent attention has them: against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cache_problems import CHUNK, CacheProblem, check, check_all, filled, random_latent_problem


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        count, seed = metafunc.config.getoption("--problems"), metafunc.config.getoption("--seed")
        metafunc.parametrize("first", range(seed, seed + count, CHUNK))


def test_random_latent_caches_agree_with_the_reference_on_the_cpu() -> None:
    check_all([random_latent_problem(seed) for seed in range(8)], "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "plan"), [("", ""), ("decode", "cluster=1")])
def test_random_latent_caches_agree_with_the_reference_on_cuda(
    first: int, family: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family:
        monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    monkeypatch.setenv("FLASH_ATTN_DECODE_PLAN", plan)
    check_all([random_latent_problem(seed) for seed in range(first, first + CHUNK)], "cuda")


@pytest.mark.gpu
def test_random_full_latent_caches_agree_with_the_reference_on_cuda(first: int) -> None:
    check_all([filled(random_latent_problem(seed)) for seed in range(first, first + CHUNK)], "cuda")


def _long(lengths: tuple[int, ...], heads: int, rows: int = 1, page_size: int = 0, full: bool = False) -> CacheProblem:
    capacity = max(lengths) if full else max(lengths) // 64 * 64 + 64
    new = 0 if full else rows
    p = CacheProblem(torch.bfloat16, lengths, capacity, heads, 1, rows, new, 576, 512, page_size, latent=True)
    return dataclasses.replace(p, causal=True, full=full)


# Over many blocks of keys, shared out over CTAs in several ways.
LONG = [
    _long((3000,), 16),
    _long((4000, 1, 0, 700), 128, page_size=64),
    _long((1000, 33, 32, 31) * 40, 64),
    _long((2000, 2500), 16, 4, page_size=16),
    _long((5000,) * 3, 128, 2),
    _long((300,) * 300, 16),
    _long((4096,) * 4, 16, full=True),
    _long((2000,) * 16, 64, full=True),
    _long((3000,) * 3, 128, 2, full=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["", "cluster=1"])
@pytest.mark.parametrize("problem", LONG, ids=range(len(LONG)))
def test_long_latent_caches_agree_with_the_reference(
    problem: CacheProblem, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTN_DECODE_PLAN", plan)
    check(problem, "cuda")
