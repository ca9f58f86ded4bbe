"""The one function that every public function of this package calls, and its ways into the ops."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .arguments import BOTTOM_RIGHT as BOTTOM_RIGHT
from .arguments import NONE as NONE
from .arguments import NUM_DIFFERENTIABLE, Options, Tensors
from .arguments import TOP_LEFT as TOP_LEFT
from .library import forward_op
from .private import jit_is_tracing, transforms_active
from .registered import flops, levels, vmap  # noqa: F401 - to register what they hold
from .registered.autograd import apply_attention, call_forward, call_op, requires_grad
from .second_order import ops  # noqa: F401 - likewise

RNG_STATE_RANGE = (-(2**63), 2**63 - 1)
_CHECK_LENGTHS = os.environ.get("FLASH_ATTN_CHECK") == "1"


def make_rng_state(device: torch.device | str) -> Tensor:
    """Seed and offset of one call's dropout mask: two int64 on `device`, drawn from torch's generator of that device.

    Safe in CUDA graphs (each replay draws anew), repeatable under `torch.manual_seed`, and subject to vmap's
    `randomness`.
    """
    return torch.randint(*RNG_STATE_RANGE, (2,), dtype=torch.int64, device=device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    packed_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    rng_state: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: int = NONE,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    heads_first: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention, differentiable, in memory linear in the sequence (Dao et al. 2022, arXiv:2205.14135).

    With ``s[i, j] = softmax_scale * q[i] . k[j]``, capped to ``softcap * tanh(s / softcap)``, plus ``attn_mask`` if it
    is floating, minus ``alibi_slope * |i + diagonal - j|``, and -inf where the boolean mask, causality, the window or
    the lengths forbid: ``out = dropout(softmax(s)) @ v``. ``diagonal`` is 0 for ``TOP_LEFT``, else seqlen_k - seqlen_q.

    float32 stays float32 on tensor cores: against float64, the RMS error of a head's out, dq, dk and dv is at most 1.05
    times (1.2 up to head_dim 32), that of lse 2.5 times, what float32 multiply-adds have.
    ``torch.backends.cuda.matmul.allow_tf32`` and ``torch.set_float32_matmul_precision`` are not consulted, but by
    second derivatives and forward mode, which are made of torch's own matrix products.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim); (batch, num_heads, seqlen_q, head_dim) with ``heads_first``;
            (total_q, num_heads, head_dim) with ``cu_seqlens_q``. float64, float32, bfloat16 or float16.
        k: as q with seqlen_k and num_heads_k, which divides num_heads.
        v: as k with head_dim_v.
        attn_mask: (batch | 1, num_heads | 1, seqlen_q | 1, seqlen_k | 1), bool (True takes part), q's dtype or float32.
        alibi_slopes: (num_heads) or (batch, num_heads), float32 (float64 for float64 q).
        sinks: (num_heads), dtype as ``alibi_slopes``: exp(sink) joins each row's sum of exponentials.
        packed_mask: what `packed_mask.pack` made of ``attn_mask``, which is not read again then; of a boolean one
            nothing is but its shape.
        cu_seqlens_q: (batch + 1) int32, where each sequence starts in q, the first at 0, and the end. Rows behind it
            get zeros.
        cu_seqlens_k: as ``cu_seqlens_q``, for k and v.
        seqused_q: (batch) int32, rows of each sequence that take part. Others get zeros.
        seqused_k: as ``seqused_q``, for k and v.
        rng_state: (2) int64, seed and offset of the dropout mask. Default: drawn from torch's generator.
        max_seqlen_q: at least the longest sequence; needed with ``cu_seqlens_q``.
        max_seqlen_k: as ``max_seqlen_q``; needed with ``cu_seqlens_k``.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: ``NONE``, ``TOP_LEFT`` or ``BOTTOM_RIGHT``.
        window_left: columns seen left of the row's own; -1 is all.
        window_right: columns seen right of the row's own; -1 is all.
        softcap: 0 is off.
        dropout_p: probability, in [0, 1], that a score is dropped.
        heads_first: the layout of q, k, v and out.
        deterministic: repeatable gradients. Default: ``torch.are_deterministic_algorithms_enabled()``.

    Returns:
        out, shaped as q with head_dim_v, in q's memory order; and the natural logarithm of each row's sum of
        exponentials, (batch, num_heads, seqlen_q) or (num_heads, total_q), float32 (float64 for float64 q).

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; the text names it.
        TypeError: an option is of another type; a tensor is no number where it is differentiated.
        torch.OutOfMemoryError: memory for the results could not be allocated.
        NotImplementedError: a third derivative, or forward mode within forward mode, is asked for.
    """
    options = Options(
        _length("q", q, cu_seqlens_q, max_seqlen_q, heads_first),
        _length("k", k, cu_seqlens_k, max_seqlen_k, heads_first),
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        dropout_p,
        heads_first,
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
    )
    if not (
        type(dropout_p) is type(softcap) is float
        and (softmax_scale is None or type(softmax_scale) is float)
        and type(causal) is type(window_left) is type(window_right) is type(options[0]) is type(options[1]) is int
        and type(heads_first) is type(options[-1]) is bool
    ):
        options = checks.plain_options(options)
    if options.dropout_p > 0.0 and rng_state is None:
        if options.dropout_p > 1.0:  # a refused call draws nothing
            raise RuntimeError(f"dropout_p must be in [0, 1], but is {options.dropout_p}")
        rng_state = make_rng_state(q.device)
    tensors = Tensors(
        q,
        k,
        v,
        attn_mask,
        alibi_slopes,
        sinks,
        packed_mask,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        rng_state,
    )
    if torch.compiler.is_compiling() or jit_is_tracing():
        out, lse, _ = forward_op(*tensors, *options)
        return out, lse
    if _CHECK_LENGTHS:
        _check_lengths(tensors, options)
    if transforms_active():
        out, lse, _ = forward_op(*tensors, *options)
    elif requires_grad(tensors[:NUM_DIFFERENTIABLE]):
        out, lse = apply_attention(tensors, options)
    else:
        out, lse, _ = call_forward(*tensors, *options)
    return out, lse


def _length(name: str, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, heads_first: bool) -> int:
    if cu_seqlens is None:
        if x.dim() != 4:
            if max_seqlen is not None:
                raise RuntimeError(f"cu_seqlens_{name} must be given with max_seqlen_{name}, but is None")
            layout = "(batch, heads, seqlen, head_dim)" if heads_first else "(batch, seqlen, heads, head_dim)"
            raise RuntimeError(f"{name} must be {layout}, but has shape {tuple(x.shape)}")
        return x.shape[2 if heads_first else 1]
    if max_seqlen is None:
        raise RuntimeError(f"max_seqlen_{name} must be given with cu_seqlens_{name}, but is None")
    return max_seqlen


def one_step(op: Any, tensors: Tensors, options: Options, arguments: Sequence[Any]) -> Any:
    """One of the ops, whose `arguments` contain `tensors` and `options`, for those who derive it themselves."""
    if torch.compiler.is_compiling() or jit_is_tracing():
        return op(*arguments)
    if _CHECK_LENGTHS:
        _check_lengths(tensors, options)
    if transforms_active() or requires_grad([x for x in arguments if isinstance(x, Tensor)]):
        return op(*arguments)
    return call_op(op, *arguments)


def _check_lengths(tensors: Tensors, options: Options) -> None:
    """With FLASH_ATTN_CHECK=1: reads lengths back from the device (which waits for it) and checks them in full."""
    for name, x, cu_seqlens, used, longest in (
        ("q", tensors.q, tensors.cu_seqlens_q, tensors.seqused_q, options.max_seqlen_q),
        ("k", tensors.k, tensors.cu_seqlens_k, tensors.seqused_k, options.max_seqlen_k),
    ):
        if cu_seqlens is not None:
            starts = cu_seqlens.tolist()
            lengths = [end - start for start, end in itertools.pairwise(starts)]
            if starts[0] != 0 or starts[-1] > x.shape[0] or any(n < 0 or n > longest for n in lengths):
                raise RuntimeError(
                    f"cu_seqlens_{name} must start with 0, not decrease, end at most at {x.shape[0]} and have no "
                    f"sequence over max_seqlen_{name} = {longest}, but is {starts}"
                )
        else:
            lengths = [longest] * x.shape[0]
        if used is not None and any(n < 0 or n > m for n, m in zip(used.tolist(), lengths, strict=True)):
            raise RuntimeError(f"seqused_{name} must lie in [0, length of its sequence], but is {used.tolist()}")
