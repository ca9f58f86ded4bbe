"""Attention of new queries over a cache of keys and values, as Dao-AILab's `flash_attn` has it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..torch_op import attention as ops
from ..torch_op import checks
from ..torch_op.cache import AppendAndAttend, Attend, attend_cache
from .arguments import (
    NO_WINDOW,
    Lengths,
    Options,
    Outputs,
    Window,
    flags,
    only_sink,
    plain_lengths,
    statistics,
    window_bounds,
)
from .other_versions import MISSING_WITH_CACHE, check_hints, refuse


@dataclass
class KVCache:
    """Keys and values of one layer, for `FlashMHA` and `flash_attn_with_kvcache`.

    Attributes:
        k: (batch, capacity, num_heads_k, head_dim), or with block_table (pages, page_size, num_heads_k, head_dim).
        v: as k.
        seqlens: (batch) int32, rows that are filled.
        block_table: (batch, blocks) int32: rows i * page_size and on of sequence b lie in page block_table[b, i].

    Layers may share ``seqlens`` and ``block_table``.
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    block_table: Tensor | None = None


_MANY_ROWS = 64  # packed query rows, over which kernels for long queries are better where they take the problem


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    pack_gqa: bool | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends new keys and values to a cache, in place, and attends to all that is in it then.

    Sequence b has rows 0 .. cache_seqlens[b] - 1 of the cache; k and v become rows cache_seqlens[b] and on. The caller
    counts cache_seqlens up afterwards. There is no gradient: a backward pass through the result raises.

    Many query rows over a cache with block_table, cache_batch_idx or cache_leftpad, in bfloat16 or float16 on a GPU,
    read a copy of the rows that are used, where that is faster. Meanwhile it takes memory for batch x (rows that a
    sequence has room for) keys and values, at most as many as the cache has; :func:`flash_attn.explain` says how much.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float64, float32, bfloat16 or float16.
        k_cache: (entries, seqlen_cache, num_heads_k, head_dim) of q's dtype, or with block_table (pages, page_size,
            num_heads_k, head_dim); the last stride is 1. Or float8_e4m3fn, both caches, on a GPU of compute capability
            8.9 or later: then q is bfloat16 or float16, head dims are multiples of 16 up to 256, and a key or value is
            the number in the cache times k_descale or v_descale.
        v_cache: as k_cache, with head_dim_v. It may be the first columns of the keys, k_cache[..., :head_dim_v], as in
            latent attention (DeepSeek-V2, 2024), with head dims up to 576 and 512 also on Hopper's kernels for few
            query rows, which read each row once; k and v that are appended then have to agree there.
        k: (batch, seqlen_new, num_heads_k, head_dim) of q's dtype, appended; to a float8 cache divided by k_descale,
            rounded to nearest, and at most 448. Default: nothing is.
        v: (batch, seqlen_new, num_heads_k, head_dim_v).
        rotary_cos: (positions, rotary_dim / 2), of q's dtype or float32, a position for each row that the cache has
            room for. With it and k, k is turned to the row where it goes, and q to rows cache_seqlens[b] + i, or
            without causal and window to row cache_seqlens[b] (Su et al. 2021).
        rotary_sin: as rotary_cos.
        cache_seqlens: rows of the cache that are filled, one int for all or (batch) int32. Default: all. Needed with k.
        cache_batch_idx: (batch) int32, the entry of the cache that a sequence has. Default: 0, 1, ...
        cache_leftpad: (batch) int32, rows at the start of the cache that take no part. Default 0.
        block_table: (batch, blocks) int32: rows i * page_size and on of a sequence lie in page block_table[b, i].
            page_size may be any; multiples of 16 are fast.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: query i sees keys up to i + (rows of the sequence) - seqlen_q.
        window_size: as for `flash_attn_func`.
        softcap: 0 is off.
        rotary_interleaved: pairs of columns are neighbours instead of halves. Default True.
        alibi_slopes: (num_heads) or (batch, num_heads), as for `flash_attn_func`.
        num_splits: a hint, >= 0, which changes no result.
        return_softmax_lse: also return lse.
        page_table: another name for block_table.
        learnable_sink: (num_heads), as for `flash_attn_func`.
        s_aux: another name for learnable_sink.
        k_descale: (batch, num_heads_k) or (num_heads_k), float32, with float8 caches alone. Default 1.
        v_descale: as k_descale.
        pack_gqa: a hint, which changes no result.
        others: what else FlashAttention 3 and 4 take, turned off (None, or 0): it is not supported.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v), and with return_softmax_lse lse (batch, num_heads, seqlen_q) in
        float32 (float64 for float64 q).

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value, or the cache has no room for k; the cache
            is untouched then. Lengths, entries and pages on a GPU are clamped to the cache there, rows without room
            left out; with FLASH_ATTN_CHECK=1 they are read and refused.
        ValueError: arguments that belong together are not given together.
        TypeError: an argument is of another type.
        NotImplementedError: another dtype, nested tensors, or an argument that is not supported.
    """
    if others or type(num_splits) is not int or num_splits < 0 or pack_gqa is not None:
        check_hints(num_splits, pack_gqa)
        refuse("flash_attn_with_kvcache", others, MISSING_WITH_CACHE)
    checks.dtype("q", checks.plain("q", q))
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.plain(name, x)
        if x.dtype != torch.float8_e4m3fn:
            checks.dtype(name, x)
    table_name, block_table = named_table(block_table, page_table)
    causal, return_lse = checks.flag("causal", causal), checks.flag("return_softmax_lse", return_softmax_lse)
    interleaved = checks.flag("rotary_interleaved", rotary_interleaved)
    left, right = window_bounds(window_size)
    _check_together(k, v, rotary_cos, rotary_sin, cache_seqlens)
    if q.dim() != 4:
        raise RuntimeError(f"q must be (batch, seqlen, heads, head_dim), but has shape {tuple(q.shape)}")
    if k is not None and checks.plain("k", k).dim() != 4:
        raise RuntimeError(f"k must be (batch, seqlen_new, heads, head_dim), but has shape {tuple(k.shape)}")
    appended = 0 if k is None else k.shape[1]
    capacity = _capacity(k_cache, block_table, table_name)
    lengths = _lengths(cache_seqlens, q, appended, capacity)
    sink = only_sink(learnable_sink, s_aux)
    attend = Attend(
        q,
        k_cache,
        v_cache,
        None if alibi_slopes is None else statistics("alibi_slopes", alibi_slopes, q),
        None if sink is None else statistics("learnable_sink" if s_aux is None else "s_aux", sink, q),
        None,
        lengths,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        k_descale,
        v_descale,
        q.shape[1],
        appended,
        checks.optional_number("softmax_scale", softmax_scale),
        ops.BOTTOM_RIGHT if causal else ops.NONE,
        left,
        right,
        checks.number("softcap", softcap),
    )
    if _CHECK_VALUES and not torch.compiler.is_compiling():
        _check_values(attend, capacity)
    try:
        if k is None or v is None:
            out, lse = attend_cache(attend)
        else:
            out, lse = attend_cache(_with_append(attend, k, v, rotary_cos, rotary_sin, interleaved))
    except RuntimeError as error:
        vectors = {"cache_seqlens": lengths, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
        tables = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "k_descale": k_descale, "v_descale": v_descale}
        for name, given in (vectors | tables).items():
            if given is not None:
                checks.plain(name, given)
        names = {"cos": "rotary_cos", "sin": "rotary_sin", "block_table": table_name}
        checks.rename(error, names | {"sinks": "learnable_sink" if s_aux is None else "s_aux"})
        raise
    return (out, lse) if return_lse else out


_CHECK_VALUES = os.environ.get("FLASH_ATTN_CHECK") == "1"


def named_table(block_table: Tensor | None, page_table: Tensor | None) -> tuple[str, Tensor | None]:
    """The one that is given, and its name."""
    if page_table is None:
        return "block_table", block_table
    if block_table is not None:
        raise ValueError("block_table and page_table are two names of one argument, but both are given")
    return "page_table", page_table


def attention_of_pages(
    q: Tensor, k: Tensor, v: Tensor, options: Options, lengths: Lengths, block_table: Tensor, table_name: str
) -> Outputs:
    """:func:`flash_attn.flash_attn_varlen_func` of keys and values in pages."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.dtype(name, checks.plain(name, x))
    if checks.number("dropout_p", options.dropout_p) != 0.0:
        raise NotImplementedError(f"dropout_p must be 0 with {table_name}, but is {options.dropout_p}")
    if lengths.seqused_q is not None:
        raise NotImplementedError(f"seqused_q must be None with {table_name}: cu_seqlens_q says which rows there are")
    causal, _, with_probs, with_lse = flags(options)
    starts_q = checks.plain("cu_seqlens_q", lengths.cu_seqlens_q)
    used = lengths.seqused_k
    if used is None:
        used = _lengths_of_starts(lengths.cu_seqlens_k, starts_q)
    sink = only_sink(options.learnable_sink, options.s_aux)
    left, right = window_bounds(options.window_size)
    bound = plain_lengths(lengths._replace(cu_seqlens_k=None, max_seqlen_k=None), q, k).max_seqlen_q
    attend = Attend(
        q,
        k,
        v,
        None if options.alibi_slopes is None else statistics("alibi_slopes", options.alibi_slopes, q),
        None if sink is None else statistics("learnable_sink" if options.s_aux is None else "s_aux", sink, q),
        starts_q,
        used,
        None,
        None,
        checks.plain(table_name, block_table),
        None,
        None,
        checks.integer("max_seqlen_q", bound),
        0,
        checks.optional_number("softmax_scale", options.softmax_scale),
        ops.BOTTOM_RIGHT if causal else ops.NONE,
        left,
        right,
        checks.number("softcap", options.softcap),
    )
    if _CHECK_VALUES and not torch.compiler.is_compiling():
        _check_values(attend, _capacity(k, block_table, table_name))
    try:
        out, lse = attend_cache(attend)
    except RuntimeError as error:
        names = {"k_cache": "k", "v_cache": "v", "cache_seqlens": "seqused_k", "block_table": table_name}
        checks.rename(error, names | {"sinks": "learnable_sink" if options.s_aux is None else "s_aux"})
        raise
    if with_probs:
        return out, lse, None
    return (out, lse) if with_lse else out


def _lengths_of_starts(starts_k: Any, starts_q: Tensor) -> Tensor:
    as_many = checks.plain("cu_seqlens_k", starts_k).shape == starts_q.shape or starts_q.dim() != 1
    if starts_k.dim() != 1 or starts_k.dtype != torch.int32 or not as_many:
        raise RuntimeError(
            f"cu_seqlens_k must be (batch + 1) int32, as cu_seqlens_q, which has shape {tuple(starts_q.shape)}, but is "
            f"{checks.described(starts_k)}"
        )
    lengths: Tensor = starts_k.diff()
    return lengths


def _check_together(k: Any, v: Any, cos: Any, sin: Any, cache_seqlens: Any) -> None:
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v, which are appended behind that many rows")
    if k is None and cos is not None:
        raise ValueError("rotary_cos must be given with k and v alone: it turns what is appended")


def _capacity(k_cache: Tensor, block_table: Any, table_name: str) -> int:
    """Rows that a sequence has room for."""
    if k_cache.dim() != 4:
        raise RuntimeError(f"k_cache must have 4 dimensions, but has shape {tuple(k_cache.shape)}")
    rows = k_cache.shape[1]
    if block_table is None:
        return rows
    table = checks.plain(table_name, block_table)
    return rows * table.shape[1] if table.dim() == 2 else rows


def _lengths(cache_seqlens: int | Tensor | None, q: Tensor, appended: int, capacity: int) -> Tensor | None:
    if cache_seqlens is None or isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    if isinstance(cache_seqlens, (list, tuple)):
        checks.tensor("cache_seqlens", cache_seqlens)
    length = checks.integer("cache_seqlens", cache_seqlens)
    if length < 0:
        raise RuntimeError(f"cache_seqlens must be >= 0, but is {length}")
    if length + appended > capacity:
        raise RuntimeError(
            f"the cache must have room for cache_seqlens = {length} rows and the {appended} that are appended, but has "
            f"{capacity}"
        )
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)


def _with_append(
    attend: Attend, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> AppendAndAttend:
    q, lengths = attend.q, attend.cache_seqlens
    assert lengths is not None
    # Many query rows over a cache without indirection are ordinary attention, once the lengths count what is new.
    direct = attend.cache_batch_idx is attend.cache_leftpad is attend.block_table is None
    # Not over float8, which kernels for long queries do not take.
    many = q.shape[1] * q.shape[2] > _MANY_ROWS * attend.k_cache.shape[2] and attend.k_cache.dtype == q.dtype
    return AppendAndAttend(
        attend.k_cache,
        attend.v_cache,
        q,
        k,
        checks.plain("v", v),
        cos,
        sin,
        attend.alibi_slopes,
        attend.sinks,
        lengths,
        lengths + attend.appended if direct and many else None,
        attend.cache_batch_idx,
        attend.cache_leftpad,
        attend.block_table,
        attend.k_descale,
        attend.v_descale,
        attend.softmax_scale,
        attend.causal,
        attend.window_left,
        attend.window_right,
        attend.softcap,
        interleaved,
    )


def _check_values(attend: Attend, capacity: int) -> None:
    """With FLASH_ATTN_CHECK=1: reads lengths, entries and pages back from the device and checks them in full."""
    entries, appended = attend.k_cache.shape[0], attend.appended
    filled = [capacity] * (attend.q.shape[0] if attend.cu_seqlens_q is None else attend.cu_seqlens_q.shape[0] - 1)
    if attend.cache_seqlens is not None:
        filled = [n + appended for n in attend.cache_seqlens.tolist()]
        if any(n < appended or n > capacity for n in filled):
            raise RuntimeError(
                f"the cache must have room for cache_seqlens and the {appended} rows that are appended, but has "
                f"{capacity}, and cache_seqlens is {attend.cache_seqlens.tolist()}"
            )
    if (index := attend.cache_batch_idx) is not None and any(i < 0 or i >= entries for i in index.tolist()):
        raise RuntimeError(f"cache_batch_idx must lie in [0, {entries}), but is {index.tolist()}")
    if (first := attend.cache_leftpad) is not None and any(
        n < 0 or n > m for n, m in zip(first.tolist(), filled, strict=True)
    ):
        raise RuntimeError(f"cache_leftpad must lie in [0, rows of its sequence], but is {first.tolist()}")
    if (table := attend.block_table) is not None:
        page_size = attend.k_cache.shape[1]
        for b, (pages, rows) in enumerate(zip(table.tolist(), filled, strict=True)):
            used = pages[: -(-rows // page_size)]
            if any(page < 0 or page >= entries for page in used):
                raise RuntimeError(f"block_table[{b}] must hold pages in [0, {entries}), but is {used}")
