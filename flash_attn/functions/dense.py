"""The functions of Dao-AILab's `flash_attn`, with its names and defaults: (batch, seqlen, heads, head_dim) layout,
causal masks aligned at the bottom right, inclusive windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import tensor_subclasses
from ..masks.prepared import PreparedMask
from ..torch_op import attention as ops
from ..torch_op import plain, private
from ..torch_op.arguments import PLAIN_DETERMINISTIC, plain_options
from .arguments import NO_WINDOW, Options, Outputs, Window, attention, distributed_attention
from .other_versions import MISSING_WITHOUT_CACHE, MaskExtras, check_hints, refuse

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FULL, _CAUSAL = (plain_options(causal, False, False) for causal in (ops.NONE, ops.BOTTOM_RIGHT))


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: Window = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    return_attn_probs: Literal[False] = ...,
    *,
    return_lse: Literal[False] = ...,
    **extras: Unpack[MaskExtras],
) -> Tensor: ...


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: Window = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    return_attn_probs: Literal[False] = ...,
    *,
    return_lse: Literal[True],
    **extras: Unpack[MaskExtras],
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: Window = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    *,
    return_attn_probs: Literal[True],
    return_lse: bool = ...,
    **extras: Unpack[MaskExtras],
) -> tuple[Tensor, Tensor, None]: ...


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: Literal[True],
    *,
    return_lse: bool = ...,
    **extras: Unpack[MaskExtras],
) -> tuple[Tensor, Tensor, None]: ...


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: Window = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    return_attn_probs: bool = ...,
    *,
    return_lse: bool = ...,
    **extras: Unpack[MaskExtras],
) -> Outputs: ...


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    attn_mask: Tensor | PreparedMask | None = None,
    **others: Any,
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
        window_size: (left, right): query i sees keys i + seqlen_k - seqlen_q - left to ... + right, both included; a
            negative number or None is no limit. A tuple, a list or a tensor of two integers.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        alibi_slopes: (num_heads) or (batch, num_heads): -slope * |i + seqlen_k - seqlen_q - j| is added to the scores
            (Press et al. 2022, section 3). Trainable.
        deterministic: repeatable gradients, also without torch.use_deterministic_algorithms.
        return_attn_probs: also return lse, and None: the probabilities are never formed.
        return_lse: also return lse.
        learnable_sink: (num_heads), a logit a head that joins the softmax's sum and has no value (Xiao et al. 2024;
            Agarwal et al. 2025, gpt-oss). Trainable.
        s_aux: another name for `learnable_sink`.
        num_splits: a hint, >= 0, which changes no result.
        pack_gqa: a hint, which changes no result.
        attn_mask: broadcasts to (batch, num_heads, seqlen_q, seqlen_k): bool (True takes part), or q's dtype or
            float32 (added to the scores, and trainable); or what :func:`flash_attn.prepare_mask` made of one. With
            causal or a window both hold.
        others: what else FlashAttention 3 and 4 take, turned off (None, or 0): it is not supported.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v); with `return_lse` (out, lse), with `return_attn_probs`
        (out, lse, None). lse is (batch, num_heads, seqlen_q), float32 (float64 for float64 q), and differentiable.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; the text names it.
        ValueError: window_size is not two integers, or both names of the sink are given.
        TypeError: an argument is of another type. A number is Python's, numpy's or a tensor of no dimensions that is
            not differentiated, and never a bool: ``flash_attn_func(q, k, v, True)`` asks for dropout_p=True.
        NotImplementedError: float8 or complex inputs, nested tensors, DTensors sharded otherwise than over batch and
            heads, or an argument of FlashAttention 3 or 4 that is not supported.

    Under autocast q, k and v are cast as for torch's own attention. DTensors are taken without slopes, sinks, masks and
    lse.
    """
    if others or type(num_splits) is not int or num_splits < 0 or pack_gqa is not None:
        check_hints(num_splits, pack_gqa)
        refuse("flash_attn_func", others, MISSING_WITHOUT_CACHE)
    if (
        not private.is_traced()  # Dynamo of torch 2.11 knows no `is` of tuples
        and alibi_slopes is learnable_sink is s_aux is attn_mask is None
        and window_size is NO_WINDOW
        and return_attn_probs is return_lse is False
        and type(q) is type(k) is type(v) is Tensor
        and type(causal) is type(deterministic) is bool
        and type(dropout_p) is type(softcap) is float
        and softcap == 0.0
        and (softmax_scale is None or type(softmax_scale) is float)
        and not has_torch_function_variadic(q)
    ):
        number = _CAUSAL if causal else _FULL
        if deterministic:
            number |= PLAIN_DETERMINISTIC
        out = plain.try_attend(q, k, v, None, softmax_scale, number, dropout_p)
        if out is not None:
            return out
    options = Options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_lse,
        learnable_sink,
        s_aux,
        attn_mask,
    )
    if type(q) is not Tensor and tensor_subclasses.is_dtensor(q, k, v):
        return distributed_attention(q, k, v, options)
    return attention(q, k, v, options)
