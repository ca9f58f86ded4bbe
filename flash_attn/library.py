"""Loads the op library and registers what torch needs to trace its two ops: fake kernels and FLOP formulas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARY = Path(__file__).parent / "lib" / "libflash_attn.so"


def _load() -> None:
    if not LIBRARY.exists():
        raise ImportError(
            f"flash_attn: there is no op library at {LIBRARY}. This is the source folder, not the installed package: "
            "run `pip install .` and start Python from another folder, or `pip install -e .` to work in this one."
        )
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 11):
        raise ImportError(f"flash_attn needs torch >= 2.11, but torch {torch.__version__} is installed")
    torch.ops.load_library(LIBRARY)


_load()

forward_op = torch.ops.flash_attn.forward.default
backward_op = torch.ops.flash_attn.backward.default


def dense_strides_like(like: Tensor, last: int) -> list[int]:
    """Strides of a dense tensor with `like`'s sizes but `last` columns, in `like`'s memory order (csrc/arguments.h)."""
    outer, stride = range(like.dim() - 1), like.stride()
    broadcast = [stride[i] == 0 and like.shape[i] > 1 for i in outer]
    order = sorted(outer, key=lambda i: (not broadcast[i], -stride[i]))
    strides = [1] * like.dim()
    step = max(last, 1)
    for i in reversed(order):
        strides[i] = step
        step = step * max(like.shape[i], 1)
    return strides


def empty_outputs(q: Tensor, v: Tensor, heads_first: bool, packed: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse of :func:`flash_attn.ops.attention`, as the op would allocate them."""
    head_dim_v = v.shape[-1]
    out = q.new_empty_strided([*q.shape[:-1], head_dim_v], dense_strides_like(q, head_dim_v))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if packed:
        return out, q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)
    heads, rows = (1, 2) if heads_first else (2, 1)
    return out, q.new_empty((q.shape[0], q.shape[heads], q.shape[rows]), dtype=dtype)


@torch.library.register_fake("flash_attn::forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    cu_seqlens_q = tensors[3]
    return empty_outputs(q, v, options["heads_first"], cu_seqlens_q is not None)


@torch.library.register_fake("flash_attn::backward")
def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *tensors: Tensor | None,
    needs: Sequence[bool],
    **options: Any,
) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = []
    for x, need in zip((q, k, v), needs, strict=False):
        gradients.append(x.new_empty_strided(x.shape, dense_strides_like(x, x.shape[-1])) if need else None)
    for y, need in zip((attn_mask, alibi_slopes, sinks), needs[3:], strict=False):
        gradients.append(torch.empty(y.shape, dtype=y.dtype, device=y.device) if need and y is not None else None)
    return tuple(gradients)


def _matmul_flops(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, **options: Any
) -> int:
    """FLOPs of q @ k.T divided by head_dim, over all heads and sequences; masked scores count too, as in torch."""
    heads = q.shape[1] if q.dim() == 3 or options["heads_first"] else q.shape[2]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        scores = int((cu_seqlens_q.diff().double() * cu_seqlens_k.diff().double()).sum().item())
    else:
        batch = q.shape[0] if q.dim() == 4 else k.shape[0]
        scores = batch * options["max_seqlen_q"] * options["max_seqlen_k"]
    return 2 * heads * scores


@register_flop_formula(torch.ops.flash_attn.forward, get_raw=True)
def _forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *tensors: Any,
    out_val: Any = None,
    **options: Any,
) -> int:
    return _matmul_flops(q, k, cu_seqlens_q, cu_seqlens_k, **options) * (q.shape[-1] + v.shape[-1])


@register_flop_formula(torch.ops.flash_attn.backward, get_raw=True)
def _backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *tensors: Any,
    out_val: Any = None,
    **options: Any,
) -> int:
    # q @ k.T again, dS @ k, dS.T @ q over head_dim; dout @ v.T, P.T @ dout over head_dim_v.
    return _matmul_flops(q, k, cu_seqlens_q, cu_seqlens_k, **options) * (3 * q.shape[-1] + 2 * v.shape[-1])
