"""What these functions share: their arguments in the forms that the op takes, and the way to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import tensor_subclasses
from ..autocast import autocast
from ..masks.prepared import PreparedMask, to_op
from ..torch_op import attention as ops
from ..torch_op import checks, plain
from ..torch_op.arguments import plain_options
from ..torch_op.private import is_traced

Window = Sequence[int | None] | Tensor
Outputs = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None]


class Options(NamedTuple):
    """As in :func:`flash_attn.flash_attn_func`."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Window
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool
    return_lse: bool
    learnable_sink: Tensor | None
    s_aux: Tensor | None
    attn_mask: Tensor | PreparedMask | None = None


class Lengths(NamedTuple):
    """Of packed sequences, as in :func:`flash_attn.flash_attn_varlen_func`."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    max_seqlen_q: Any = None  # int or Tensor
    max_seqlen_k: Any = None


ONE_LENGTH = Lengths()
NO_WINDOW = (-1, -1)
_PLAIN = {
    (causal, deterministic): plain_options(ops.BOTTOM_RIGHT if causal else ops.NONE, False, deterministic)
    for causal in (False, True)
    for deterministic in (False, True)
}


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options, lengths: Lengths = ONE_LENGTH) -> Outputs:
    """What :func:`flash_attn.flash_attn_func` returns, of plain tensors."""
    dropout_p, scale, causal, window, softcap, slopes, deterministic, with_probs, with_lse, sink, s_aux, mask = options
    if not (type(q) is type(k) is type(v) is Tensor):
        q, k, v = (checks.plain(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    if not (type(causal) is type(deterministic) is type(with_probs) is type(with_lse) is bool):
        causal, deterministic, with_probs, with_lse = flags(options)
    if torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
        q, k, v = autocast(q, k, v)
    left, right = window_bounds(window)
    if s_aux is not None:
        sink = only_sink(sink, s_aux)
    starts_q, starts_k, used_q, used_k, longest_q, longest_k = (
        lengths if lengths is ONE_LENGTH else plain_lengths(lengths, q, k)
    )
    try:
        if (
            slopes is sink is mask is None
            and not (with_lse or with_probs)
            and lengths is ONE_LENGTH
            and not is_traced()
            and _is_plain(options, left, right)
            and type(q) is type(k) is type(v) is Tensor
            and not has_torch_function_variadic(q)
        ):
            out = plain.try_attend(q, k, v, None, scale, _PLAIN[causal, deterministic], dropout_p)
            if out is not None:
                return out
        values, packed = (None, None) if mask is None else _mask(mask, q, k)
        out, lse = ops.attention(
            q,
            k,
            v,
            values,
            None if slopes is None else statistics("alibi_slopes", slopes, q),
            None if sink is None else statistics("learnable_sink" if s_aux is None else "s_aux", sink, q),
            packed,
            starts_q,
            starts_k,
            used_q,
            used_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            softmax_scale=scale,
            causal=ops.BOTTOM_RIGHT if causal else ops.NONE,
            window_left=left,
            window_right=right,
            softcap=softcap,
            dropout_p=dropout_p,
            deterministic=True if deterministic else None,
        )
    except RuntimeError as error:
        for name, x in zip("qkv", (q, k, v), strict=True):
            checks.plain(name, x)
        _check_vectors(lengths)
        checks.dtype("q", q)
        checks.rename(error, {"sinks": "learnable_sink" if s_aux is None else "s_aux"})
        raise
    if with_probs:
        return out, lse, None
    return (out, lse) if with_lse else out


def _mask(mask: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    if not isinstance(mask, PreparedMask):
        checks.plain("attn_mask", mask)
        if torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
            (mask,) = autocast(mask)
    if q.dim() != 4 or k.dim() != 4:
        raise RuntimeError(
            f"q and k must be (batch, seqlen, heads, head_dim), but have shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )
    return to_op(mask, q, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))


def _is_plain(options: Options, left: int, right: int) -> bool:
    """Whether `plain.try_attend` has all that is given besides tensors."""
    dropout_p, scale, softcap = options.dropout_p, options.softmax_scale, options.softcap
    return (
        type(left) is type(right) is int  # which numpy's are not while the compiler traces
        and left == right == -1
        and type(dropout_p) is type(softcap) is float
        and softcap == 0.0
        and (scale is None or type(scale) is float)
    )


def distributed_attention(q: Any, k: Any, v: Any, options: Options) -> Tensor:
    """:func:`attention` of DTensors that are sharded over batch and heads."""
    whole = {"return_lse": options.return_lse, "return_attn_probs": options.return_attn_probs}
    whole |= {name: getattr(options, name) is not None for name in ("alibi_slopes", "learnable_sink", "s_aux")}
    whole["attn_mask"] = options.attn_mask is not None
    for name, given in whole.items():
        if given:
            raise NotImplementedError(
                f"{name} must not be given with DTensors, but is: call the function with q.to_local(), k.to_local() "
                "and v.to_local(), and what belongs to the heads of this rank"
            )
    for name, x in (("q", q), ("k", k), ("v", v)):
        for placement in getattr(x, "placements", ()):
            if not (placement.is_replicate() or placement.is_shard(0) or placement.is_shard(2)):
                raise NotImplementedError(
                    f"{name} must be replicated or sharded over batch (0) or heads (2), but its placements are "
                    f"{x.placements}"
                )

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), options)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return tensor_subclasses.distributed_attention(attend, q, k, v, None).transpose(1, 2)


def flags(options: Options) -> tuple[bool, ...]:
    names = ("causal", "deterministic", "return_attn_probs", "return_lse")
    return tuple(checks.flag(name, getattr(options, name)) for name in names)


def window_bounds(window_size: Window) -> tuple[int, int]:
    try:
        left, right = window_size
        if type(left) is type(right) is int and left >= -1 <= right:
            return left, right
        return _side(left), _side(right)
    except (TypeError, ValueError):
        raise ValueError(
            "window_size must be two integers (left, right), None or negative where there is no limit, but is "
            f"{window_size!r}"
        ) from None


def _side(x: Any) -> int:
    if isinstance(x, Tensor) and checks.is_integral(x):
        x = int(x)
    return -1 if x is None else max(checks.integer("window_size", x), -1)


def only_sink(learnable_sink: Tensor | None, s_aux: Tensor | None) -> Tensor | None:
    if s_aux is None:
        return learnable_sink
    if learnable_sink is not None:
        raise ValueError("learnable_sink and s_aux are two names of one argument, but both are given")
    return s_aux


def statistics(name: str, x: Tensor, q: Tensor) -> Tensor:
    """Slopes and sinks in the dtype that the kernels compute the softmax in."""
    if checks.tensor(name, x).is_complex():
        raise RuntimeError(f"{name} must be real, but is {x.dtype}")
    return x.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _check_vectors(lengths: Lengths) -> None:
    for name, x in zip(Lengths._fields[:4], lengths[:4], strict=True):
        if x is not None:
            checks.tensor(name, x)


def plain_lengths(lengths: Lengths, q: Tensor, k: Tensor) -> Lengths:
    """Bounds as numbers, and tensors where tensors have to be."""
    starts_q, starts_k, used_q, used_k, longest_q, longest_k = lengths
    plain = type(starts_q) is type(starts_k) is Tensor and type(longest_q) is type(longest_k) is int
    if plain and used_q is used_k is None:
        return lengths
    _check_vectors(lengths)
    return lengths._replace(
        max_seqlen_q=_longest("max_seqlen_q", longest_q, q, starts_q),
        max_seqlen_k=_longest("max_seqlen_k", longest_k, k, starts_k),
    )


def _longest(name: str, bound: Any, x: Tensor, starts: Tensor | None) -> int | None:
    """A bound of the lengths in x. All of its rows are one too, where the caller's is not there to be read at once."""
    if isinstance(bound, Tensor):
        if not checks.is_integral(bound):
            raise TypeError(f"{name} must be an int or a tensor of one integer, but is {checks.described(bound)}")
        if bound.device.type == "cpu" and not torch.compiler.is_compiling():
            return int(bound)
    elif bound is not None or starts is None:
        return bound
    return x.shape[0] if x.dim() > 0 else 0
