"""Many query rows over caches in pages, by an index or with rows that take no part: what sequences use is copied, and
the kernels for long queries attend to it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_problems import CHUNK, CacheProblem, call, check, check_all, filled, make_inputs, random_cache_problem
from flash_attn import Explanation, explain, flash_attn_varlen_func, flash_attn_with_kvcache
from introspection import needs_introspection

pytestmark = pytest.mark.gpu
INT32 = torch.int32
BF16, FP16 = torch.bfloat16, torch.float16
not_forced = pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        count, seed = metafunc.config.getoption("--problems"), metafunc.config.getoption("--seed")
        metafunc.parametrize("first", range(seed, seed + count, CHUNK))


@pytest.mark.parametrize("family", ["sm90", "sm80"])
def test_random_caches_on_copies_agree_with_the_reference(
    first: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forced family copies for any number of rows."""
    monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    random = [random_cache_problem(seed, (BF16, FP16)) for seed in range(first, first + CHUNK)]
    check_all([*random, *map(filled, random[:5])], "cuda")


PLACES: list[dict[str, Any]] = [
    {"page_size": 16},
    {"page_size": 48, "leftpad": True},
    {"page_size": 256},
    {"batch_index": True},
    {"leftpad": True},
    {"batch_index": True, "leftpad": True},
]
SCORES: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (70, 0), "causal": True},
    {"window": (300, 40)},
    {"slopes": "head", "causal": True},
    {"slopes": "batch"},
    {"softcap": 5.0, "causal": True},
    {"sinks": True, "causal": True, "scale": 0.2},
]


def _problem(place: dict[str, Any], scores: dict[str, Any], **more: Any) -> CacheProblem:
    """Lengths of nothing, of one row and of all; 800 packed rows, of which parts of a tile see nothing."""
    sizes = {"capacity": 1008, "heads": 8, "heads_k": 2, "seqlen_q": 200, "head_dim": 128, "head_dim_v": 128}
    lengths = (0, 1, 1008 - more.get("appended", 0), 777)
    return CacheProblem(**{"dtype": BF16, "lengths": lengths, **sizes, **place, **scores, **more})


HEAD_DIMS = [(64, 64), (96, 96), (192, 128), (256, 256), (80, 40), (20, 20), (64, 128), (320, 256), (33, 7), (512, 512)]
KINDS = [_problem(*both, seed=i) for i, both in enumerate(itertools.product(PLACES, SCORES))]
OTHERS = [
    *(dataclasses.replace(p, dtype=FP16) for p in KINDS[::5]),
    *(_problem(place, {"causal": True}, appended=200, rotary_dim=64, interleaved=True) for place in PLACES),
    *(_problem(place, {"window": (100, 0)}, appended=37, rotary_dim=128, dtype=FP16) for place in PLACES),
    *(
        _problem(place, {"causal": True}, head_dim=d, head_dim_v=dv, appended=200)
        for place, (d, dv) in zip(PLACES * 2, HEAD_DIMS, strict=False)
    ),
    *(_problem(place, {"causal": True}, heads=6, heads_k=n) for place, n in zip(PLACES, (1, 2, 3), strict=False)),
    # Capacities of which a part is used, and copies of so many rows that a block takes several chunks.
    CacheProblem(BF16, (5000, 0, 20000), 65536, 4, 1, 300, 0, 64, 64, 16, causal=True),
    CacheProblem(BF16, (40000,), 65536, 8, 1, 130, 130, 128, 128, 64, causal=True, window=(1000, 0)),
    CacheProblem(BF16, (3000,) * 2, 4096, 16, 4, 600, 600, 128, 128, 1, causal=True),
]


def _explained(problem: CacheProblem) -> Explanation:
    return explain(lambda: call(problem, make_inputs(problem), "cuda"))


@pytest.mark.parametrize("family", ["", "sm90", "sm80"])
@pytest.mark.parametrize("problem", [*KINDS, *OTHERS], ids=range(len(KINDS) + len(OTHERS)))
def test_many_rows_agree_with_the_reference(
    problem: CacheProblem, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family:
        monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    check(problem, "cuda")


@needs_introspection
@not_forced
@pytest.mark.parametrize("place", PLACES, ids=repr)
def test_they_are_copied(place: dict[str, Any]) -> None:
    (made,) = _explained(_problem(place, {"causal": True})).calls
    assert made.forward.family in ("sm90", "sm80")
    size = "4.0" if place == {"page_size": 256} else "3.9"  # MiB, of whole pages
    assert [text.partition(" of rows")[0] for text in made.copies] == [f"keys and values of the cache, {size} MiB"]


def test_rows_that_nobody_uses_are_not_read() -> None:
    """They are NaN in the problems; with other numbers bits are the same."""
    problem = _problem({"page_size": 16, "leftpad": True}, {"causal": True}, appended=20)
    given = make_inputs(problem)
    out, lse, *_ = call(problem, given, "cuda")
    other = dataclasses.replace(given, k_cache=given.k_cache.nan_to_num(9.0), v_cache=given.v_cache.nan_to_num(-9.0))
    again, lse_again, *_ = call(problem, other, "cuda")
    assert torch.isfinite(out[1:]).all()
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


def _paged_call(rows: int = 200) -> dict[str, Any]:
    """Two sequences with room for 512 rows in pages of 16, of which a graph may fill any."""
    given: dict[str, Any] = {n: torch.randn(70, 16, 2, 64, device="cuda", dtype=BF16) for n in ("k_cache", "v_cache")}
    given |= {n: torch.randn(2, rows, 2, 64, device="cuda", dtype=BF16) for n in ("k", "v")}
    given["q"] = torch.randn(2, rows, 16, 64, device="cuda", dtype=BF16)
    given["cache_seqlens"] = torch.tensor([3, 250], dtype=INT32, device="cuda")
    given["block_table"] = torch.randperm(70, device="cuda")[:64].view(2, 32).int()
    return given


def test_a_cuda_graph_copies_anew_at_each_replay() -> None:
    given = _paged_call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        flash_attn_with_kvcache(**{name: x.clone() for name, x in given.items()}, causal=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = flash_attn_with_kvcache(**given, causal=True)
    torch.cuda.synchronize()
    for lengths in ([0, 312], [17, 100], [300, 1]):
        given["cache_seqlens"].copy_(torch.tensor(lengths))
        given["block_table"].copy_(torch.randperm(70)[:64].view(2, 32))
        for name in ("q", "k", "v"):
            given[name].normal_()
        other = {name: x.clone() for name, x in given.items()}
        graph.replay()
        want = flash_attn_with_kvcache(**other, causal=True)
        assert torch.equal(out, want)
        assert torch.equal(given["k_cache"], other["k_cache"]) and torch.equal(given["v_cache"], other["v_cache"])


def test_they_compile_in_one_graph() -> None:
    def step(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out = flash_attn_with_kvcache(**given, causal=True)
        return out, given["k_cache"] + given["v_cache"]

    given = _paged_call()
    other = {name: x.clone() for name, x in given.items()}
    want, got = step(given), torch.compile(step, fullgraph=True, backend="aot_eager")(other)
    for a, b in zip((*want, *given.values()), (*got, *other.values()), strict=True):
        assert torch.equal(a, b)


def test_bad_values_read_and_write_nothing_else() -> None:
    around = torch.full((3, 4, 32, 2, 64), 7.0, dtype=BF16, device="cuda")
    k_cache, v_cache = around[1, :2], around[1, 2:]
    q, new = torch.randn(2, 200, 16, 64, dtype=BF16, device="cuda"), torch.ones(2, 3, 2, 64, dtype=BF16, device="cuda")
    for bad in (-(2**31), -5, 31, 1000, 2**31 - 1):
        wrong = torch.full((2,), bad, dtype=INT32, device="cuda")
        for more in ({"cache_batch_idx": wrong}, {"cache_leftpad": wrong}, {"block_table": wrong.view(2, 1)}):
            out = flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=wrong, causal=True, **more)
            assert isinstance(out, Tensor) and out.shape == q.shape
    torch.cuda.synchronize()
    assert (around[0] == 7).all() and (around[2] == 7).all()


@pytest.mark.parametrize("window", [(-1, -1), (300, 0), (40, 0)])
def test_packed_queries_over_pages_are_those_over_packed_keys(window: tuple[int, int]) -> None:
    lengths_q, lengths_k = [200, 150, 130, 1, 0], [400, 9, 130, 500, 20]
    starts_q, starts_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=INT32, device="cuda")
        for n in (lengths_q, lengths_k)
    )
    q = torch.randn(sum(lengths_q) + 2, 16, 64, device="cuda", dtype=BF16)
    k, v = (torch.randn(sum(lengths_k), 2, 64, device="cuda", dtype=BF16) for _ in range(2))
    pages = torch.full((2, 170, 16, 2, 64), math.nan, device="cuda", dtype=BF16)
    table = torch.randperm(170)[:160].view(5, 32).int()
    for b, (start, n) in enumerate(zip(starts_k.tolist(), lengths_k, strict=False)):
        rows = torch.arange(n)
        places = table[b, rows // 16].long() * 16 + rows % 16
        for cache, x in zip(pages, (k, v), strict=True):
            cache.view(-1, 2, 64)[places.cuda()] = x[start : start + n]
    options: dict[str, Any] = {"causal": True, "window_size": window, "return_lse": True}
    want = flash_attn_varlen_func(q, k, v, starts_q, starts_k, 200, 500, **options)
    for used in ({}, {"seqused_k": torch.tensor(lengths_k, dtype=INT32, device="cuda")}):
        starts = starts_k if not used else None
        got = flash_attn_varlen_func(q, *pages, starts_q, starts, 200, 500, block_table=table.cuda(), **options, **used)
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
        assert torch.equal(got[0][-2:], torch.zeros_like(got[0][-2:]))


@not_forced
def test_copies_take_the_memory_that_explain_says_and_give_it_back() -> None:
    given = _paged_call()
    flash_attn_with_kvcache(**given, causal=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = flash_attn_with_kvcache(**given, causal=True)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak >= 2 * 2 * 512 * 2 * 64 * 2
    del out
    assert torch.cuda.memory_allocated() == before
