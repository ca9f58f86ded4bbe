"""The functions of Dao-AILab's `flash_attn`, with its names and defaults: (batch, seqlen, heads, head_dim) layout,
causal masks aligned at the bottom right, inclusive windows."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_op import attention as ops

Outputs = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Outputs:
    """Attention of a batch of sequences of one length (Dao 2023, arXiv:2307.08691).

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float64, float32, bfloat16 or float16.
        k: (batch, seqlen_k, num_heads_k, head_dim); num_heads_k divides num_heads, and query head h reads key head
            h // (num_heads // num_heads_k).
        v: (batch, seqlen_k, num_heads_k, head_dim_v).
        dropout_p: probability, in [0, 1], of dropping a score. 0 in evaluation.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right): query i sees keys i + seqlen_k - seqlen_q - left to ... + right, both included;
            -1 is no limit.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        alibi_slopes: (num_heads) or (batch, num_heads): -slope * |i + seqlen_k - seqlen_q - j| is added to the scores
            (Press et al. 2022, section 3). Trainable.
        deterministic: repeatable gradients, also without torch.use_deterministic_algorithms.
        return_attn_probs: also return lse, and None: the probabilities are never formed.
        return_lse: also return lse.
        learnable_sink: (num_heads), a logit a head that joins the softmax's sum and has no value (Xiao et al. 2024;
            Agarwal et al. 2025, gpt-oss). Trainable.
        s_aux: another name for `learnable_sink`.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v); with `return_lse` (out, lse), with `return_attn_probs`
        (out, lse, None). lse is (batch, num_heads, seqlen_q), float32 (float64 for float64 q), and differentiable.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; the text names it.
        ValueError: window_size is not two integers, or both names of the sink are given.
    """
    left, right = _window(window_size)
    out, lse = ops.attention(
        q,
        k,
        v,
        None,
        _statistics(alibi_slopes, q),
        _statistics(_sink(learnable_sink, s_aux), q),
        softmax_scale=softmax_scale,
        causal=ops.BOTTOM_RIGHT if causal else ops.NONE,
        window_left=left,
        window_right=right,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=True if deterministic else None,
    )
    return _outputs(out, lse, return_attn_probs, return_lse)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Outputs:
    """Attention of packed sequences of different lengths. Arguments not listed are those of `flash_attn_func`.

    Args:
        q: (total_q, num_heads, head_dim).
        k: (total_k, num_heads_k, head_dim).
        v: (total_k, num_heads_k, head_dim_v).
        cu_seqlens_q: (batch + 1) int32: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1 of q.
        cu_seqlens_k: (batch + 1) int32, the same for k and v.
        max_seqlen_q: at least the longest sequence in q. A tensor of one element on a CUDA device is waited for.
        max_seqlen_k: at least the longest sequence in k.
        block_table: not supported; must be None.
        seqused_q: (batch) int32: only so many rows of each sequence take part, others get zeros.
        seqused_k: (batch) int32, the same for k and v.

    Returns:
        As `flash_attn_func`, with out (total_q, num_heads, head_dim_v) and lse (num_heads, total_q).

    Raises:
        NotImplementedError: block_table is given.
    """
    if block_table is not None:
        raise NotImplementedError("block_table must be None: paged keys and values are not supported")
    left, right = _window(window_size)
    out, lse = ops.attention(
        q,
        k,
        v,
        None,
        _statistics(alibi_slopes, q),
        _statistics(_sink(learnable_sink, s_aux), q),
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q=int(max_seqlen_q) if isinstance(max_seqlen_q, Tensor) else max_seqlen_q,
        max_seqlen_k=int(max_seqlen_k) if isinstance(max_seqlen_k, Tensor) else max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=ops.BOTTOM_RIGHT if causal else ops.NONE,
        window_left=left,
        window_right=right,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=True if deterministic else None,
    )
    return _outputs(out, lse, return_attn_probs, return_lse)


def _window(window_size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size must be two integers (left, right), but is {window_size!r}")
    return window_size[0], window_size[1]


def _statistics(x: Tensor | None, q: Tensor) -> Tensor | None:
    """Slopes and sinks in the dtype that the kernels compute the softmax in."""
    return None if x is None else x.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _sink(learnable_sink: Tensor | None, s_aux: Tensor | None) -> Tensor | None:
    if learnable_sink is not None and s_aux is not None:
        raise ValueError("learnable_sink and s_aux are two names of one argument, but both are given")
    return s_aux if learnable_sink is None else learnable_sink


def _outputs(out: Tensor, lse: Tensor, return_attn_probs: bool, return_lse: bool) -> Outputs:
    if return_attn_probs:
        return out, lse, None
    return (out, lse) if return_lse else out
