"""Caches in float8_e4m3fn: against float64, refusals, numbers beyond their range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cache_problems import CHUNK, check_all, filled, random_float8_problem, small_call
from flash_attn import flash_attn_with_kvcache


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        count, seed = metafunc.config.getoption("--problems"), metafunc.config.getoption("--seed")
        metafunc.parametrize("first", range(seed, seed + count, CHUNK))


@pytest.mark.gpu
def test_random_float8_caches_agree_with_the_reference_on_cuda(first: int) -> None:
    check_all([random_float8_problem(seed) for seed in range(first, first + CHUNK)], "cuda")


@pytest.mark.gpu
def test_random_full_float8_caches_agree_with_the_reference_on_cuda(first: int) -> None:
    check_all([filled(random_float8_problem(seed)) for seed in range(first, first + CHUNK)], "cuda")


def _float8_cache(device: str) -> dict[str, Any]:
    given = small_call(device, torch.bfloat16)
    return given | {name: given[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("error", "text", "changed"),
    [
        (
            RuntimeError,
            "v_cache must have k_cache's dtype bfloat16, but is float8",
            {"k_cache": torch.ones(2, 8, 2, 16).bfloat16()},
        ),
        (RuntimeError, "k must have q's dtype bfloat16, but is float8_e4m3fn", {"k": torch.float8_e4m3fn}),
        (RuntimeError, "q must be bfloat16 or float16 with caches of float8", dict.fromkeys("qkv", torch.float32)),
        (RuntimeError, "k_descale must be float32, but is float16", {"k_descale": torch.ones(2).half()}),
        (RuntimeError, r"k_descale must have shape \(batch, heads\)", {"k_descale": torch.ones(3)}),
        (RuntimeError, r"v_descale must have shape \(batch, heads\)", {"v_descale": torch.ones(1, 2)}),
        (RuntimeError, r"v_descale must have shape \(batch, heads\)", {"v_descale": torch.ones(1, 2, 2)}),
        (RuntimeError, "v_descale must be on q's device cuda:0", {"v_descale": None}),
        (RuntimeError, "head_dim is not a multiple of 16", {"head_dim": 8}),
    ],
)
def test_bad_input_to_float8_caches_is_refused_and_they_are_untouched(
    error: type[Exception], text: str, changed: dict[str, Any]
) -> None:
    given = _float8_cache("cuda")
    for name, x in changed.items():
        if name == "head_dim":
            given |= {n: given[n][..., :x] for n in ("q", "k", "v")}
            given |= {n: given[n].float()[..., :x].to(torch.float8_e4m3fn) for n in ("k_cache", "v_cache")}
        elif x is None:
            given[name] = torch.ones(2)
        else:
            given[name] = given[name].to(x) if isinstance(x, torch.dtype) else x.to("cuda")
    before = given["k_cache"].float(), given["v_cache"].float()
    with pytest.raises(error, match=text):
        flash_attn_with_kvcache(**given)
    assert torch.equal(given["k_cache"].float(), before[0]) and torch.equal(given["v_cache"].float(), before[1])


def test_float8_caches_on_the_cpu_are_refused() -> None:
    given = _float8_cache("cpu")
    for call_given in (given, {name: x for name, x in given.items() if name not in ("k", "v")}):
        with pytest.raises(RuntimeError, match=r"float8_e4m3fn must be on a GPU of compute capability 8\.9 or later"):
            flash_attn_with_kvcache(**call_given)


@pytest.mark.gpu
def test_numbers_beyond_float8_become_its_largest() -> None:
    given = _float8_cache("cuda")
    given["k"] = torch.full_like(given["k"], 1e4)
    given["v"] = torch.full_like(given["v"], -1e4)
    out = flash_attn_with_kvcache(**given, v_descale=torch.full((2,), 0.5, device="cuda"))
    assert torch.isfinite(out).all()  # type: ignore[arg-type]
    for name, number in (("k_cache", 448.0), ("v_cache", -448.0)):
        cache = given[name].float()
        assert (cache[0, 3] == number).all() and (cache[1, 5] == number).all()
