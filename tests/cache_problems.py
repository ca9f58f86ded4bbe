"""Problems over a cache of keys and values: random ones, and the check that holds a call against the reference."""

from __future__ import annotations

import dataclasses
import math
import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import problems
import reference
from flash_attn import flash_attn_with_kvcache

CHUNK = 25  # problems of a test


@dataclass(frozen=True)
class CacheProblem:
    """One call of `flash_attn_with_kvcache`. `lengths` are filled rows before the call, one a sequence."""

    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (5, 17)
    capacity: int = 40
    heads: int = 2
    heads_k: int = 1
    seqlen_q: int = 1
    appended: int = 0
    head_dim: int = 16
    head_dim_v: int = 16
    page_size: int = 0  # 0: contiguous
    spare: int = 2  # entries or pages that no sequence has
    batch_index: bool = False
    leftpad: bool = False
    rotary_dim: int = 0
    interleaved: bool = False
    float32_tables: bool = False
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    slopes: str = ""  # "head" or "batch"
    sinks: bool = False
    one_length: bool = False  # cache_seqlens is an int: that of all
    full: bool = False  # cache_seqlens is not given, and lengths are all of the cache
    float8: str = ""  # the caches are, with a descale for each "head" or for each of each sequence ("batch")
    latent: bool = False  # v_cache is the first head_dim_v columns of k_cache, and v of k
    seed: int = 0

    def __repr__(self) -> str:
        return problems.repr_of_changes(self)


def random_cache_problem(seed: int, dtypes: tuple[torch.dtype, ...] = problems.DTYPES) -> CacheProblem:
    rng = random.Random(seed)

    def sometimes(share: float = 1 / 3) -> bool:
        return rng.random() < share

    capacity = rng.choice((1, 16, rng.randint(1, 100), rng.randint(100, 500)))
    page_size = rng.choice((1, 4, 16, 16, 32, 48, 64, 256)) if sometimes(0.5) else 0
    seqlen_q = rng.choice((1, 1, 1, 2, 3, 5, 16, 40, 200))
    appended = min(capacity, rng.choice((seqlen_q, 1, rng.randint(1, 20)))) if sometimes(0.5) else 0
    batch = rng.choice((1, 2, 3, 5))
    most = capacity - appended
    lengths = tuple(
        rng.choice((0, min(1, most), most, rng.randint(0, most), rng.randint(0, most))) for _ in range(batch)
    )
    one_length = sometimes(0.15)
    heads_k = rng.choice((1, 1, 2, 3))
    head_dim = rng.choice((8, 16, 64, 64, 96, 128, 128, 192, 256, 40, 80))
    rotary_dim = rng.choice((head_dim, head_dim // 4 * 2)) if appended and sometimes(0.5) else 0
    return CacheProblem(
        dtype=rng.choice(dtypes),
        lengths=lengths[:1] * batch if one_length else lengths,
        capacity=capacity,
        heads=heads_k * rng.choice((1, 2, 4, 5, 8, 16)),
        heads_k=heads_k,
        seqlen_q=seqlen_q,
        appended=appended,
        head_dim=head_dim,
        head_dim_v=head_dim if sometimes(0.8) else rng.choice((8, 64, 128)),
        page_size=page_size,
        spare=rng.choice((0, 3)),
        batch_index=not page_size and sometimes(),
        leftpad=sometimes(0.25),
        rotary_dim=rotary_dim,
        interleaved=sometimes(0.5),
        float32_tables=sometimes(),
        causal=sometimes(0.5),
        window=(rng.choice((-1, 0, rng.randint(0, 200))), rng.choice((-1, 0, rng.randint(0, 80))))
        if sometimes()
        else (-1, -1),
        softcap=rng.choice((0.5, 3.0, 30.0)) if sometimes(0.2) else 0.0,
        scale=rng.choice((0.3, 1.0, -0.2)) if sometimes(0.2) else None,
        slopes=rng.choice(("head", "batch")) if sometimes(0.25) else "",
        sinks=sometimes(0.25),
        one_length=one_length,
        seed=seed,
    )


def random_float8_problem(seed: int) -> CacheProblem:
    """As random_cache_problem, over float8 caches."""
    problem = random_cache_problem(seed, (torch.bfloat16, torch.float16))
    head_dim, head_dim_v = (max(16, n // 16 * 16) for n in (problem.head_dim, problem.head_dim_v))
    rotary_dim = min(problem.rotary_dim, head_dim)
    kind = random.Random(seed).choice(("head", "batch"))
    return dataclasses.replace(problem, head_dim=head_dim, head_dim_v=head_dim_v, rotary_dim=rotary_dim, float8=kind)


def random_latent_problem(seed: int) -> CacheProblem:
    """As random_cache_problem, with values that are a part of the keys: of one key head, nearly always of 576 and 512
    columns."""
    problem = random_cache_problem(seed, (torch.bfloat16, torch.float16))
    rng = random.Random(seed)
    head_dim, head_dim_v = rng.choice(((576, 512), (576, 512), (576, 512), (320, 256), (512, 512), (576, 448)))
    heads = rng.choice((1, 16, 64, 128, problem.heads))
    changes = {"heads": heads, "heads_k": 1, "head_dim": head_dim, "head_dim_v": head_dim_v}
    return dataclasses.replace(problem, rotary_dim=0, latent=True, scale=head_dim**-0.5, **changes)


def filled(problem: CacheProblem) -> CacheProblem:
    """The same over a cache, mostly a longer one, that is full and says no lengths."""
    p, rng = problem, random.Random(problem.seed)
    capacity = rng.choice((p.capacity, rng.randint(100, 3000), 2048))
    if p.page_size:
        capacity = math.ceil(capacity / p.page_size) * p.page_size
    lengths, without = (capacity,) * len(p.lengths), {"appended": 0, "rotary_dim": 0, "leftpad": False}
    return dataclasses.replace(p, lengths=lengths, capacity=capacity, one_length=False, full=True, **without)


@dataclass
class Inputs:
    """The arguments of a call, on the CPU, and where each row of each sequence lies in the cache."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    batch_index: Tensor | None
    leftpad: Tensor | None
    table: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    places: Tensor  # (batch, capacity): rows of the cache as (entries * rows, ...)


def make_inputs(problem: CacheProblem) -> Inputs:
    """Rows of the cache that are not filled, and pages that no sequence has, are NaN."""
    p, g = problem, torch.Generator().manual_seed(problem.seed)

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(p.dtype)

    batch = len(p.lengths)
    index = table = None
    if p.page_size:
        blocks = math.ceil(p.capacity / p.page_size)
        order = torch.randperm(batch * blocks + p.spare, generator=g)
        table = order[: batch * blocks].view(batch, blocks).int()
        rows = torch.arange(p.capacity)
        places = table.long()[:, rows // p.page_size] * p.page_size + rows % p.page_size
        shape = (len(order), p.page_size)
    else:
        entries = torch.randperm(batch + p.spare, generator=g)[:batch] if p.batch_index else torch.arange(batch)
        index = entries.int() if p.batch_index else None
        places = entries[:, None] * p.capacity + torch.arange(p.capacity)
        shape = (batch + (p.spare if p.batch_index else 0), p.capacity)
    caches = []
    for columns in (p.head_dim, p.head_dim_v):
        cache = torch.full((*shape, p.heads_k, columns), math.nan, dtype=torch.float32 if p.float8 else p.dtype)
        for b, length in enumerate(p.lengths):
            cache.view(-1, p.heads_k, columns)[places[b, :length]] = random_tensor(length, p.heads_k, columns).to(
                cache.dtype
            )
        caches.append(cache)
    if p.latent:
        caches[1] = caches[0][..., : p.head_dim_v]
    filled = [n + p.appended for n in p.lengths]
    leftpad = torch.tensor([int(torch.randint(0, n + 1, (), generator=g)) for n in p.lengths]) if p.leftpad else None
    if leftpad is not None:
        for b, first in enumerate(leftpad.tolist()):
            for cache in caches:
                cache.view(-1, *cache.shape[2:])[places[b, :first]] = math.nan
    statistics = torch.float64 if p.dtype == torch.float64 else torch.float32
    tables = p.dtype if not p.float32_tables else torch.float32
    angles = torch.randn(
        (p.capacity if not p.page_size else places.shape[1] + p.page_size, p.rotary_dim // 2), generator=g
    )
    assert max(filled) <= p.capacity
    descales = [
        torch.rand((batch, p.heads_k) if p.float8 == "batch" else (p.heads_k,), generator=g) + 0.25
        if p.float8
        else None
        for _ in range(2)
    ]
    if p.float8:
        caches = [cache.to(torch.float8_e4m3fn) for cache in caches]
    q = random_tensor(batch, p.seqlen_q, p.heads, p.head_dim)
    k = random_tensor(batch, p.appended, p.heads_k, p.head_dim) if p.appended else None
    v = random_tensor(batch, p.appended, p.heads_k, p.head_dim_v) if p.appended else None
    return Inputs(
        q,
        *caches,
        k,
        k[..., : p.head_dim_v] if p.latent and k is not None else v,
        angles.cos().to(tables) if p.rotary_dim else None,
        angles.sin().to(tables) if p.rotary_dim else None,
        index,
        None if leftpad is None else leftpad.int(),
        table,
        torch.rand((batch, p.heads) if p.slopes == "batch" else (p.heads,), generator=g, dtype=statistics)
        if p.slopes
        else None,
        torch.randn(p.heads, generator=g, dtype=statistics) if p.sinks else None,
        *descales,
        places,
    )


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (rows, heads, head_dim) turned to positions (rows), in float64 and rounded once."""
    half = cos.shape[1]
    c, s = (table.double()[positions].unsqueeze(1) for table in (cos, sin))
    exact = x.double()
    pairs = exact[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    x1, x2 = pairs.unbind(-1 if interleaved else -2)
    both = torch.stack((x1 * c - x2 * s, x1 * s + x2 * c), -1 if interleaved else -2).flatten(-2)
    return torch.cat((both, exact[..., 2 * half :]), -1).to(x.dtype)


def descale_of(descale: Tensor | None, b: int) -> Tensor:
    """(heads, 1), of sequence b."""
    if descale is None:
        return torch.ones(1, 1)
    return (descale[b] if descale.dim() == 2 else descale)[:, None]


def as_numbers(problem: CacheProblem, cache: Tensor) -> Tensor:
    """In a dtype that can be indexed."""
    return cache.float() if problem.float8 else cache


def expected_cache(problem: CacheProblem, given: Inputs) -> tuple[Tensor, Tensor]:
    """The caches after the call, float8 ones in float32."""
    p = problem
    caches = tuple(
        as_numbers(p, x).clone(memory_format=torch.contiguous_format) for x in (given.k_cache, given.v_cache)
    )
    for b, length in enumerate(p.lengths):
        rows = torch.arange(p.appended) + length
        descales = (given.k_descale, given.v_descale)
        for cache, new, turns, descale in zip(caches, (given.k, given.v), (True, False), descales, strict=True):
            if new is None:
                continue
            x = new[b]
            if turns and given.cos is not None and given.sin is not None:
                x = turned(x, given.cos, given.sin, rows, p.interleaved)
            if p.float8:
                x = (x.float() / descale_of(descale, b)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            cache.view(-1, *cache.shape[2:])[given.places[b, rows]] = x
    return caches


def expected(
    problem: CacheProblem, given: Inputs, caches: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out and lse in `dtype`, by the reference, of each sequence's rows one after the other; `caches` are those after
    the call."""
    p = problem
    k_cache, v_cache = (cache.view(-1, *cache.shape[2:]) for cache in caches)
    outs, lses = [], []
    for b, length in enumerate(p.lengths):
        first = 0 if given.leftpad is None else int(given.leftpad[b])
        rows = given.places[b, first : length + p.appended]
        q = given.q[b]
        if given.cos is not None and given.sin is not None:
            steps = torch.arange(p.seqlen_q) if p.causal or p.window != (-1, -1) else torch.zeros(p.seqlen_q).long()
            at = (steps + length).clamp(max=given.cos.shape[0] - 1)
            q = turned(q, given.cos, given.sin, at, p.interleaved)
        slopes = given.slopes if given.slopes is None or given.slopes.dim() == 1 else given.slopes[b]
        out, lse = reference.attention(
            q[None].to(dtype),
            (k_cache[rows][None].double() * descale_of(given.k_descale, b)).to(dtype),
            (v_cache[rows][None].double() * descale_of(given.v_descale, b)).to(dtype),
            alibi_slopes=slopes,
            sinks=given.sinks,
            softmax_scale=p.scale,
            causal=2 if p.causal else 0,
            window_left=p.window[0],
            window_right=p.window[1],
            softcap=p.softcap,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def call(problem: CacheProblem, given: Inputs, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse and the caches after the call."""
    p = problem
    on = {f.name: x if x is None else x.to(device) for f in dataclasses.fields(given) for x in [getattr(given, f.name)]}
    k_cache, v_cache = (torch.empty_like(x).copy_(x) for x in (on["k_cache"], on["v_cache"]))
    if p.latent:
        v_cache = k_cache[..., : p.head_dim_v]
    lengths = p.lengths[0] if p.one_length else torch.tensor(p.lengths, dtype=torch.int32, device=device)
    result = flash_attn_with_kvcache(
        on["q"],
        k_cache,
        v_cache,
        on["k"],
        on["v"],
        on["cos"],
        on["sin"],
        None if p.full else lengths,
        on["batch_index"],
        on["leftpad"],
        on["table"],
        p.scale,
        p.causal,
        p.window,
        p.softcap,
        p.interleaved,
        on["slopes"],
        0,
        True,
        learnable_sink=on["sinks"],
        k_descale=on["k_descale"],
        v_descale=on["v_descale"],
    )
    return *result, k_cache, v_cache


def moved(given: Inputs, device: str) -> Inputs:
    return dataclasses.replace(
        given,
        **{f.name: x.to(device) for f in dataclasses.fields(given) for x in [getattr(given, f.name)] if x is not None},
    )


def check(problem: CacheProblem, device: str) -> None:
    p, given = problem, make_inputs(problem)
    there = problems.reference_device_on_cuda if device == "cuda" else "cpu"
    try:
        out, lse, *caches = call(p, given, device)
    except RuntimeError as error:
        if f"FLASH_ATTN_FORCE={os.environ.get('FLASH_ATTN_FORCE')} does not take this problem" in str(error):
            return
        raise
    given = moved(given, there)
    with torch.device(there):
        _compare(p, given, out.to(there), lse.to(there), [x.to(there) for x in caches])


def _compare(p: CacheProblem, given: Inputs, out: Tensor, lse: Tensor, caches: list[Tensor]) -> None:
    after = expected_cache(p, given)
    for name, got, want in zip(("k_cache", "v_cache"), caches, after, strict=True):
        close = 1e-12 if p.dtype == torch.float64 else 2 * torch.finfo(p.dtype).eps
        if p.float8:  # neighbours, where the number was about half way
            close = torch.finfo(torch.float8_e4m3fn).eps
        same = torch.isclose(as_numbers(p, got), want, rtol=close, atol=close, equal_nan=True)
        assert same.all(), f"{name}: {int((~same).sum())} entries differ, the first at {(~same).nonzero()[0].tolist()}"
    if p.float8:
        after = as_numbers(p, caches[0]), as_numbers(p, caches[1])
    truth, eager = expected(p, given, after, torch.float64), expected(p, given, after, p.dtype)
    reference.assert_close("out", out, truth[0], eager[0], 2, p.dtype)
    reference.assert_close("lse", lse, truth[1], eager[1], 2, p.dtype)


def check_all(many: list[CacheProblem], device: str) -> None:
    """Every one of them, and then what failed."""
    failures = []
    for problem in many:
        try:
            check(problem, device)
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{problem!r}: {error}")
    if failures:
        pytest.fail(f"{len(failures)} of {len(many)} problems:\n" + "\n".join(failures), pytrace=False)


def small_call(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A call of two sequences with 3 and 5 filled rows, of caches with 8."""
    q, k, v = (torch.randn(2, 1, 2, 16, dtype=dtype, device=device) for _ in range(3))
    k_cache, v_cache = (torch.randn(2, 8, 2, 16, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.tensor([3, 5], dtype=torch.int32, device=device)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": lengths}
