"""Forward and backward as single steps, for those who write their own `autograd.Function` around them: ring attention,
sequence parallelism. Names, arguments and returned values are those of Dao's flash_attn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_op import attention as ops
from ..torch_op import checks
from ..torch_op.arguments import NUM_DIFFERENTIABLE, Options, Tensors
from ..torch_op.library import backward_op, forward_op
from .arguments import ONE_LENGTH, Lengths, plain_lengths, statistics


def _plain(name: str, x: Tensor) -> Tensor:
    # Inside an autograd.Function's backward Dynamo lets nobody look at a tensor's layout.
    return x if type(x) is Tensor and torch.compiler.is_compiling() else checks.plain(name, x)


def _rows(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else 0  # the op refuses what has other dimensions


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    deterministic: bool | None,
    lengths: Lengths = ONE_LENGTH,
) -> tuple[Tensors, Options]:
    """As the ops take them."""
    q, k, v = (_plain(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    lengths = (
        lengths._replace(max_seqlen_q=_rows(q), max_seqlen_k=_rows(k))
        if lengths is ONE_LENGTH
        else plain_lengths(lengths, q, k)
    )
    slopes = None if alibi_slopes is None else statistics("alibi_slopes", alibi_slopes, q)
    left, right = (
        max(checks.integer(name, x), -1)
        for name, x in zip(("window_size_left", "window_size_right"), window, strict=True)
    )
    mask = ops.BOTTOM_RIGHT if checks.flag("causal", causal) else ops.NONE
    always = torch.are_deterministic_algorithms_enabled()
    repeat = always if deterministic is None else checks.flag("deterministic", deterministic) or always
    bounds = lengths.max_seqlen_q, lengths.max_seqlen_k
    options = Options(*bounds, softmax_scale, mask, left, right, softcap, dropout_p, False, repeat)
    return Tensors(q, k, v, None, slopes, None, None, *lengths[:4], rng_state), checks.plain_options(options)


def _forward(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = tensors.q
    if options.dropout_p > 0.0:
        tensors = tensors._replace(rng_state=ops.make_rng_state(q.device))
    out, lse, rng_used = ops.one_step(forward_op, tensors, options, (*tensors, *options))
    if rng_used is None:
        rng_used = torch.empty(2, dtype=torch.int64, device=q.device)
    return out, lse, q.new_empty(0), rng_used


def _backward(
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    tensors: Tensors,
    options: Options,
) -> Tensor:
    dout, out, softmax_lse = (
        _plain(name, x) for name, x in (("dout", dout), ("out", out), ("softmax_lse", softmax_lse))
    )
    for name, like, wanted in zip("qkv", tensors, gradients, strict=False):
        _check_gradient(f"d{name}", name, wanted, like)
    needs = [gradient is not None for gradient in gradients] + [False] * (NUM_DIFFERENTIABLE - 3)
    try:
        arguments = (dout, None, *tensors, out, softmax_lse, needs, *options)
        computed = ops.one_step(backward_op, tensors, options, arguments)
    except RuntimeError as error:
        checks.rename(error, {"lse": "softmax_lse"})
        raise
    for wanted, gradient in zip(gradients, computed, strict=False):
        if wanted is not None:
            wanted.copy_(gradient)
    return (dout.to(softmax_lse.dtype) * out).sum(-1).mT.contiguous()


def _check_gradient(name: str, of: str, gradient: Tensor | None, like: Tensor | None) -> None:
    if gradient is None or like is None:
        return
    _plain(name, gradient)
    if (gradient.shape, gradient.dtype, gradient.device) != (like.shape, like.dtype, like.device):
        raise RuntimeError(
            f"{name} must be as {of}, {like.dtype} {tuple(like.shape)} on {like.device}, but is {gradient.dtype} "
            f"{tuple(gradient.shape)} on {gradient.device}"
        )


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One forward pass. Arguments not listed are those of `flash_attn_func`; any head_dim is taken.

    Args:
        softmax_scale: None is 1 / sqrt(head_dim).
        window_size_left, window_size_right: a negative number is no limit.
        return_softmax: accepted; the probabilities are never formed.

    Returns:
        out; softmax_lse (batch, num_heads, seqlen_q), float32 (float64 for float64 q), -inf where a row sees no key;
        an empty tensor in the place of the probabilities; and rng_state (2) int64, which backward takes, and which
        says nothing where dropout_p is 0.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; the text names it.
        TypeError: an argument is of another type.
    """
    checks.flag("return_softmax", return_softmax)
    window = window_size_left, window_size_right
    arguments = _arguments(q, k, v, alibi_slopes, None, dropout_p, softmax_scale, causal, window, softcap, None)
    return _forward(*arguments)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One forward pass over packed sequences. Arguments not listed are those of `flash_attn_varlen_func`.

    Args:
        window_size_left, window_size_right: a negative number is no limit.
        return_softmax: accepted; the probabilities are never formed.
        block_table, leftpad_k: not supported; must be None.
        zero_tensors: accepted; rows of no sequence get zeros anyway.
        num_splits: a hint, which changes no result.

    Returns:
        As `_flash_attn_forward`, with softmax_lse (num_heads, total_q).

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; the text names it.
        TypeError: an argument is of another type.
        NotImplementedError: block_table or leftpad_k are given.
    """
    if block_table is not None:
        raise NotImplementedError("block_table must be None: flash_attn_varlen_func takes it, and returns lse too")
    if leftpad_k is not None:
        raise NotImplementedError("leftpad_k must be None: begin a sequence where its keys do, with cu_seqlens_k")
    checks.flag("return_softmax", return_softmax), checks.flag("zero_tensors", zero_tensors)
    checks.integer("num_splits", num_splits)
    window = window_size_left, window_size_right
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, None, seqused_k, max_seqlen_q, max_seqlen_k)
    return _forward(
        *_arguments(q, k, v, alibi_slopes, None, dropout_p, softmax_scale, causal, window, softcap, None, lengths)
    )


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """One backward pass, of the same arguments as forward.

    Args:
        dout: as out.
        out, softmax_lse: what forward returned, or, where keys are spread over several calls, what these together
            amount to.
        dq, dk, dv: as q, k and v; the gradients are written into them. None is not computed.
        deterministic: gradients that repeat bit for bit.
        rng_state: what forward returned; needed where dropout_p > 0.

    Returns:
        The row sums of dout * out, of softmax_lse's shape and dtype.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; the text names it. Nothing is written.
        TypeError: an argument is of another type.
    """
    window = window_size_left, window_size_right
    tensors, options = _arguments(
        q, k, v, alibi_slopes, rng_state, dropout_p, softmax_scale, causal, window, softcap, deterministic
    )
    return _backward(dout, out, softmax_lse, (dq, dk, dv), tensors, options)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """One backward pass over packed sequences: `_flash_attn_backward` with the lengths of forward.

    Args:
        zero_tensors: accepted; rows of no sequence get zeros anyway.
    """
    checks.flag("zero_tensors", zero_tensors)
    window = window_size_left, window_size_right
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, None, None, max_seqlen_q, max_seqlen_k)
    tensors, options = _arguments(
        q, k, v, alibi_slopes, rng_state, dropout_p, softmax_scale, causal, window, softcap, deterministic, lengths
    )
    return _backward(dout, out, softmax_lse, (dq, dk, dv), tensors, options)


# By these names other packages call what their torch has registered as ops; here both are the same.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
