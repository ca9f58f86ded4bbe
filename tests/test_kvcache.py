"""`flash_attn_with_kvcache`, and pages in `flash_attn_varlen_func`: against float64, refusals, compiled, captured."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_problems import (
    CHUNK,
    CacheProblem,
    call,
    check,
    check_all,
    filled,
    make_inputs,
    random_cache_problem,
    small_call,
)
from flash_attn import flash_attn_func, flash_attn_interface, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.functions import kvcache

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INT32 = torch.int32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        count, seed = metafunc.config.getoption("--problems"), metafunc.config.getoption("--seed")
        metafunc.parametrize("first", range(seed, seed + count, CHUNK))


def test_random_caches_agree_with_the_reference_on_the_cpu(first: int) -> None:
    check_all([random_cache_problem(seed) for seed in range(first, first + CHUNK)], "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "plan"), [("", ""), ("decode", ""), ("decode", "cluster=1"), ("universal", "")])
def test_random_caches_agree_with_the_reference_on_cuda(
    first: int, family: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family:
        monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    monkeypatch.setenv("FLASH_ATTN_DECODE_PLAN", plan)
    check_all([random_cache_problem(seed) for seed in range(first, first + CHUNK)], "cuda")


@pytest.mark.gpu
def test_random_full_caches_agree_with_the_reference_on_cuda(first: int) -> None:
    check_all([filled(random_cache_problem(seed)) for seed in range(first, first + CHUNK)], "cuda")


def test_full_caches_agree_with_the_reference_on_the_cpu() -> None:
    check_all([filled(random_cache_problem(seed)) for seed in range(8)], "cpu")


# Over many blocks of keys, shared out over CTAs in several ways.
LONG = [
    CacheProblem(
        dtype=torch.bfloat16, lengths=(3000,), capacity=3000, heads=32, heads_k=8, head_dim=128, head_dim_v=128
    ),
    CacheProblem(torch.float16, (1, 0, 900, 33, 2500), 2600, 8, 2, 3, 3, 64, 64, 16, causal=True, sinks=True),
    CacheProblem(torch.bfloat16, (700, 4000), 4096, 16, 1, 16, 16, 128, 128, 64, causal=True),
    CacheProblem(torch.bfloat16, (70,) * 150, 96, 4, 4, 1, 0, 64, 64, 32, leftpad=True),
    CacheProblem(torch.bfloat16, (2000, 100), 2048, 4, 2, 200, 40, 192, 192, 256, causal=True, window=(300, 0)),
    CacheProblem(torch.float16, (2000, 2000), 2048, 24, 2, 7, 7, 256, 256, causal=True, softcap=20.0, slopes="batch"),
    CacheProblem(torch.bfloat16, (1500, 20), 2048, 6, 2, 2, 2, 96, 96, 48, window=(64, 0), causal=True),
    CacheProblem(torch.bfloat16, (3000, 17), 3072, 32, 4, 4, 4, 128, 128, 16, causal=True),
    CacheProblem(torch.float16, (1500, 0, 2000), 2048, 8, 2, 8, 8, 256, 256, causal=True, sinks=True),
    CacheProblem(torch.bfloat16, (3000, 0, 70), 3100, 32, 8, 1, 1, 128, 128, 256, float8="batch"),
    CacheProblem(torch.float16, (1, 900, 2500), 2600, 8, 2, 3, 3, 64, 64, 16, causal=True, sinks=True, float8="head"),
    CacheProblem(torch.bfloat16, (700, 4000), 4096, 16, 1, 16, 16, 256, 256, 64, causal=True, float8="head"),
    # Of full caches each tile has as many CTAs: clusters of 8, of which one or two have a tile, of 4 and of 2; one CTA.
    *(
        CacheProblem(torch.bfloat16, (keys,) * batch, keys, heads, heads_k, rows, 0, 128, 128, causal=True, full=True)
        for batch, keys, heads, heads_k, rows in (
            (1, 1024, 32, 8, 1),
            (1, 1000, 32, 4, 2),
            (8, 1024, 32, 8, 1),
            (16, 900, 32, 8, 1),
            (3, 2000, 32, 1, 1),
            (5, 1111, 24, 2, 5),
            (33, 300, 32, 8, 4),
        )
    ),
    CacheProblem(torch.float16, (2000,) * 3, 2000, 4, 1, 1, 0, 64, 64, full=True, sinks=True, softcap=9.0),
    CacheProblem(torch.bfloat16, (2048,) * 2, 2048, 16, 2, 8, 0, 192, 192, 64, causal=True, full=True),
    CacheProblem(torch.bfloat16, (4096,), 4096, 32, 2, 1, 0, 256, 64, full=True, slopes="head"),
    CacheProblem(torch.bfloat16, (4096,) * 2, 4096, 32, 4, 1, 0, 128, 128, full=True, float8="batch"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["", "cluster=1"])
@pytest.mark.parametrize("problem", LONG, ids=range(len(LONG)))
def test_long_caches_agree_with_the_reference(
    problem: CacheProblem, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTN_DECODE_PLAN", plan)
    check(problem, "cuda")


def test_a_problem_can_be_reproduced_from_its_repr() -> None:
    problem = random_cache_problem(7)
    assert eval(repr(problem), {"CacheProblem": CacheProblem, "torch": torch}) == problem


def test_parameters_and_defaults_are_those_of_the_api() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD}
    nothing = inspect.Parameter.empty
    assert list(positional.items()) == [
        ("q", nothing),
        ("k_cache", nothing),
        ("v_cache", nothing),
        ("k", None),
        ("v", None),
        ("rotary_cos", None),
        ("rotary_sin", None),
        ("cache_seqlens", None),
        ("cache_batch_idx", None),
        ("cache_leftpad", None),
        ("block_table", None),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ]
    assert flash_attn_interface.flash_attn_with_kvcache is flash_attn_with_kvcache


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("error", "text", "changed"),
    [
        (RuntimeError, "k must have k_cache's dtype float32, but is bfloat16", {"k": _ones(2, 1, 2, 16).bfloat16()}),
        (RuntimeError, "k_cache must have q's dtype bfloat16", {"q": _ones(2, 1, 2, 16).bfloat16()}),
        (RuntimeError, r"q and k_cache must have the same head_dim", {"q": _ones(2, 1, 2, 8)}),
        (RuntimeError, "heads of k_cache and v_cache must divide those of q", {"q": _ones(2, 1, 3, 16)}),
        (RuntimeError, "an entry for each sequence, or cache_batch_idx", {"q": _ones(3, 1, 2, 16)}),
        (RuntimeError, r"k must be \(batch, seqlen_new", {"k": _ones(2, 1, 1, 16)}),
        (RuntimeError, r"v must be \(batch, seqlen_new", {"v": _ones(2, 2, 2, 16)}),
        (RuntimeError, "room for the rows that are appended", {"k": _ones(2, 9, 2, 16), "v": _ones(2, 9, 2, 16)}),
        (RuntimeError, "cache must have room for cache_seqlens = 8 rows and the 1", {"cache_seqlens": 8}),
        (RuntimeError, "cache_seqlens must be >= 0, but is -1", {"cache_seqlens": -1}),
        (RuntimeError, "cache_seqlens must be int32, but is int64", {"cache_seqlens": torch.tensor([1, 1])}),
        (RuntimeError, r"cache_seqlens must have shape \(batch\)", {"cache_seqlens": torch.ones(3, dtype=INT32)}),
        (TypeError, "cache_seqlens must be an int", {"cache_seqlens": 1.0}),
        (ValueError, "cache_seqlens must be given with k and v", {"cache_seqlens": None}),
        (ValueError, "k and v must be given together", {"v": None}),
        (ValueError, "rotary_cos and rotary_sin must be given together", {"rotary_cos": _ones(8, 8)}),
        (RuntimeError, "a position for each row of the cache, 8, but has 7", {"rotary_cos": _ones(7, 8)}),
        (RuntimeError, "at most head_dim / 2 = 8 columns, but have 9", {"rotary_cos": _ones(8, 9)}),
        (RuntimeError, "must both be float32", {"rotary_cos": _ones(8, 8).half()}),
        (RuntimeError, "block_table must be int32, but is int64", {"block_table": torch.zeros(2, 1).long()}),
        (RuntimeError, "block_table must have shape", {"block_table": torch.zeros(1, 1).int()}),
        (RuntimeError, "last stride of 1, but has 2", {"block_table": torch.zeros(2, 4).int()[:, ::2]}),
        (RuntimeError, "k_cache must have a last stride of 1", {"k_cache": _ones(2, 8, 2, 32)[..., ::2]}),
        (RuntimeError, "k_cache and v_cache must have the same", {"v_cache": _ones(2, 7, 2, 16)}),
        (RuntimeError, r"learnable_sink must have shape", {"learnable_sink": _ones(3)}),
        (ValueError, "two names", {"page_table": torch.zeros(2, 1).int(), "block_table": torch.zeros(2, 1).int()}),
        (NotImplementedError, "qv must be None", {"qv": _ones(1)}),
        (NotImplementedError, "cu_seqlens_q must be None", {"cu_seqlens_q": _ones(1)}),
        (NotImplementedError, "q_descale must be None", {"q_descale": _ones(1)}),
        (RuntimeError, "k_descale must be None with caches that are not float8", {"k_descale": _ones(2)}),
        (ValueError, "num_splits must be >= 0", {"num_splits": -1}),
        (TypeError, "unexpected keyword argument 'windows'", {"windows": 1}),
    ],
)
def test_bad_input_is_refused_and_the_cache_untouched(
    error: type[Exception], text: str, changed: dict[str, Any], device: str
) -> None:
    given = small_call(device)
    for name, x in changed.items():
        strided = isinstance(x, Tensor) and not x.is_contiguous()
        moved = x.to(device) if isinstance(x, Tensor) else x
        if strided and device != "cpu":  # a copy is contiguous
            moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).zero_()
        given[name] = moved
    if "rotary_cos" in changed and "together" not in text:
        given["rotary_sin"] = given["rotary_cos"]
    before = given["k_cache"].clone(), given["v_cache"].clone()
    with pytest.raises(error, match=text):
        flash_attn_with_kvcache(**given)
    assert torch.equal(given["k_cache"], before[0]) and torch.equal(given["v_cache"], before[1])


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("room for cache_seqlens", {"cache_seqlens": torch.tensor([3, 8], dtype=INT32)}),
        ("room for cache_seqlens", {"cache_seqlens": torch.tensor([-1, 2], dtype=INT32)}),
        ("cache_batch_idx must lie in", {"cache_batch_idx": torch.tensor([0, 2], dtype=INT32)}),
        ("cache_leftpad must lie in", {"cache_leftpad": torch.tensor([5, 0], dtype=INT32)}),
        (r"block_table\[1\]", {"block_table": torch.tensor([[0], [2]], dtype=INT32)}),
        (r"block_table\[0\]", {"block_table": torch.tensor([[-1], [1]], dtype=INT32)}),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_bad_values_are_refused_on_the_cpu_and_where_asked_for(
    text: str, changed: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = small_call(device)
    given |= {name: x.to(device) for name, x in changed.items()}
    before = given["k_cache"].clone()
    if device == "cpu":
        with pytest.raises(RuntimeError, match=text):
            flash_attn_with_kvcache(**given)
    monkeypatch.setattr(kvcache, "_CHECK_VALUES", True)
    with pytest.raises(RuntimeError, match=text):
        flash_attn_with_kvcache(**given)
    assert torch.equal(given["k_cache"], before)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["", "universal"])
def test_bad_values_on_a_gpu_read_and_write_nothing_else(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are clamped: what surrounds the cache stays, and nothing crashes."""
    if family:
        monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    for dtype in (torch.bfloat16, torch.float32):
        around = torch.full((3, 4, 32, 2, 64), 7.0, dtype=dtype, device="cuda")
        k_cache, v_cache = around[1, :2], around[1, 2:]
        q, new = (
            torch.randn(2, 3, 4, 64, dtype=dtype, device="cuda"),
            torch.ones(2, 3, 2, 64, dtype=dtype, device="cuda"),
        )
        for bad in (-(2**31), -5, 31, 1000, 2**31 - 1):
            wrong = torch.full((2,), bad, dtype=INT32, device="cuda")
            for more in (
                {},
                {"cache_batch_idx": wrong},
                {"cache_leftpad": wrong},
                {"block_table": wrong.view(2, 1).repeat(1, 5)},
            ):
                out = flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=wrong, causal=True, **more)
                assert out.shape == q.shape
        torch.cuda.synchronize()
        assert (around[0] == 7).all() and (around[2] == 7).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_sequence_has_changes_nothing(device: str, page_size: int, dtype: torch.dtype) -> None:
    """Rows that are not filled and pages of nobody are NaN in the problems; other numbers give the same bits."""
    problem = CacheProblem(dtype, (5, 30), 64, 4, 2, 2, 2, 64, 64, page_size, leftpad=True, causal=True)
    given = make_inputs(problem)
    out, lse, *_ = call(problem, given, device)
    assert torch.isfinite(out).all()
    other = dataclasses.replace(given, k_cache=given.k_cache.nan_to_num(9.0), v_cache=given.v_cache.nan_to_num(-9.0))
    again, lse_again, *_ = call(problem, other, device)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [0, 16])
def test_it_compiles_in_one_graph_and_the_append_is_seen(device: str, page_size: int) -> None:
    def step(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out = flash_attn_with_kvcache(**given, causal=True)
        return out, given["k_cache"] + given["v_cache"]  # reads what the call has written

    given = small_call(device)
    if page_size:
        caches = {name: torch.randn(4, page_size, 2, 16, device=device) for name in ("k_cache", "v_cache")}
        given |= {**caches, "block_table": torch.tensor([[3], [1]], dtype=INT32, device=device)}
    other = {name: x.clone() for name, x in given.items()}
    want, got = step(given), torch.compile(step, fullgraph=True, backend="aot_eager")(other)
    for a, b in zip((*want, *given.values()), (*got, *other.values()), strict=True):
        assert torch.equal(a, b)


def test_ops_pass_torchs_checks() -> None:
    from flash_attn.torch_op.cache import AppendAndAttend, Attend

    g = small_call()
    one = (None, 0, 2, -1, -1, 0.0)
    attend = Attend(
        g["q"],
        g["k_cache"],
        g["v_cache"],
        None,
        None,
        None,
        g["cache_seqlens"],
        *(None,) * 5,
        1,
        *one[1:2],
        *one[:1],
        *one[2:],
    )
    torch.library.opcheck(torch.ops.flash_attn.attend_cache.default, tuple(attend), test_utils=CHECKS)
    append = AppendAndAttend(
        g["k_cache"],
        g["v_cache"],
        g["q"],
        g["k"],
        g["v"],
        *(None,) * 4,
        g["cache_seqlens"],
        *(None,) * 6,
        None,
        2,
        -1,
        -1,
        0.0,
        False,
    )
    torch.library.opcheck(torch.ops.flash_attn.append_and_attend.default, tuple(append), test_utils=CHECKS)


CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 16])
def test_a_cuda_graph_appends_anew_at_each_replay(page_size: int) -> None:
    given = small_call("cuda", torch.bfloat16)
    if page_size:
        caches = {n: torch.randn(4, page_size, 2, 16, device="cuda").bfloat16() for n in ("k_cache", "v_cache")}
        given |= {**caches, "block_table": torch.tensor([[3], [1]], dtype=INT32, device="cuda")}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        flash_attn_with_kvcache(**{name: x.clone() for name, x in given.items()})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = flash_attn_with_kvcache(**given)
    torch.cuda.synchronize()
    for step in range(3):
        given["cache_seqlens"].fill_(step + 2)
        for name in ("q", "k", "v"):
            given[name].normal_()
        other = {name: x.clone() for name, x in given.items()}
        graph.replay()
        want = flash_attn_with_kvcache(**other)
        assert torch.equal(out, want)
        assert torch.equal(given["k_cache"], other["k_cache"]) and torch.equal(given["v_cache"], other["v_cache"])


@pytest.mark.parametrize("device", DEVICES)
def test_autograd_is_told_what_is_appended(device: str) -> None:
    for name in ("k_cache", "v_cache"):
        given = small_call(device)
        weight = torch.ones((), device=device, dtype=given[name].dtype, requires_grad=True)
        loss = (given[name] * weight).sum()
        flash_attn_with_kvcache(**given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_whose_rows_share_memory_is_not_appended_to(device: str) -> None:
    for name in ("k_cache", "v_cache"):
        for dim in (0, 1, 2):
            given = small_call(device)
            given[name] = given[name].select(dim, 0).unsqueeze(dim).expand_as(given[name])
            with pytest.raises(RuntimeError, match=f"{name} must have elements of its own"):
                flash_attn_with_kvcache(**given)
            for new in ("k", "v"):
                del given[new]
            flash_attn_with_kvcache(**given)


@pytest.mark.parametrize("device", DEVICES)
def test_there_is_no_gradient_and_it_is_not_zero(device: str) -> None:
    given = small_call(device)
    given["q"].requires_grad_()
    out = flash_attn_with_kvcache(**given)
    assert not isinstance(out, tuple)
    with pytest.raises(NotImplementedError, match="attention over a cache has no gradient"):
        out.sum().backward()
    with torch.no_grad():
        assert not flash_attn_with_kvcache(**given).requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["block_table", "page_table"])
def test_packed_queries_over_pages_are_those_over_packed_keys(device: str, name: str) -> None:
    lengths_q, lengths_k = [3, 0, 7, 1], [40, 9, 7, 90]
    starts_q, starts_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=INT32, device=device)
        for n in (lengths_q, lengths_k)
    )
    q = torch.randn(sum(lengths_q) + 2, 4, 32, device=device)
    k, v = (torch.randn(sum(lengths_k), 2, 32, device=device) for _ in range(2))
    pages = torch.full((2, 30, 16, 2, 32), float("nan"), device=device)
    table = torch.randperm(30)[:24].view(4, 6).int()
    for b, (start, n) in enumerate(zip(starts_k.tolist(), lengths_k, strict=False)):
        for i in range(n):
            for cache, x in zip(pages, (k, v), strict=True):
                cache[table[b, i // 16], i % 16] = x[start + i]
    want = flash_attn_varlen_func(q, k, v, starts_q, starts_k, 7, 90, causal=True, return_lse=True)
    given: dict[str, Any] = {name: table.to(device)}
    for used in ({}, {"seqused_k": torch.tensor(lengths_k, dtype=INT32, device=device)}):
        got = flash_attn_varlen_func(
            q, *pages, starts_q, starts_k if not used else None, 7, 90, causal=True, return_lse=True, **given, **used
        )
        torch.testing.assert_close(got, want)
    for more, text in (({"dropout_p": 0.1}, "dropout_p must be 0"), ({"seqused_q": starts_q[1:]}, "seqused_q")):
        with pytest.raises(NotImplementedError, match=re.escape(text)):
            flash_attn_varlen_func(q, *pages, starts_q, starts_k, 7, 90, **given, **more)


@pytest.mark.parametrize("device", DEVICES)
def test_a_whole_cache_is_ordinary_attention(device: str) -> None:
    q, k, v = (torch.randn(2, 5, 2, 16, device=device) for _ in range(3))
    want = flash_attn_func(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True), want)
