"""The short way of eager calls of q, k, v and perhaps a mask. Small calls are mostly these, and cost what their
arguments cost, so they go to ops of five and eight arguments in place of 22 and 28, or to torch's op for extensions.

Whoever looks at ops (dispatch modes, transforms, tracers, compiled autograd, subclasses) sees `flash_attn::forward` and
`flash_attn::backward` alone: callers ask before.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from . import extension, private
from .arguments import NUM_DIFFERENTIABLE, NUM_TENSORS, PLAIN_DETERMINISTIC, PLAIN_WITHOUT_LSE, from_plain
from .library import backward_op, forward_op, plain_backward_op, plain_forward_op, registrations
from .registered.autograd import call_backward, raise_out_of_memory

_is_traced, _is_grad_enabled, _is_deterministic = private.is_traced, torch.is_grad_enabled, private.is_deterministic
_forward, _backward = (private.past_torch_function(op) for op in (plain_forward_op, plain_backward_op))
_ops_are_watched, _any_autocast = private.ops_are_watched, private.any_autocast
_NOT_GIVEN = (None,) * (NUM_TENSORS - 3)
_ALL = (True, True, True, False)  # of q, k, v and settings


def try_attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, softmax_scale: float | None, options: int
) -> Tensor | None:
    """The first result of :func:`flash_attn.torch_op.attention.attention`, if an op takes these tensors as they are,
    here and now. They are of no subclass, no torch function mode is active, and `options` are those of
    `plain_options`; gradients are repeatable where these or torch say so. The mask may have fewer than four dimensions.

    Shapes, dtypes and devices are the op's to look at: that takes it a tenth of the time. Who gets None goes the long
    way, which can do more, or says why nobody can. With `PLAIN_IF_THEY_FIT` among the options, where shapes do not fit.
    """
    if (
        _is_traced()
        or not (q.is_cuda or q.is_cpu)
        or _ops_are_watched()
        or (_any_autocast() and _autocast_changes(q, k, v))
    ):
        return None
    differentiable = extension.forward
    if attn_mask is not None and (
        differentiable is None
        or not (attn_mask.dtype is torch.bool or attn_mask.dtype is q.dtype)  # autocast might change it
    ):
        return None
    out: Tensor | None
    try:
        if not _is_grad_enabled() or not (
            q.requires_grad or k.requires_grad or v.requires_grad or (attn_mask is not None and attn_mask.requires_grad)
        ):
            options |= PLAIN_WITHOUT_LSE
            if attn_mask is None:
                out, _ = _forward(q, k, v, softmax_scale, options)
                return out
        else:
            if _is_deterministic():
                options |= PLAIN_DETERMINISTIC
            if differentiable is None or q.numel() > extension.LARGEST:
                out = None if attn_mask is not None else _apply(q, k, v, (softmax_scale, options))
                return out
        assert differentiable is not None
        if softmax_scale is None:
            results = differentiable(q, k, v, attn_mask, -1.0 - options)
        else:
            results = differentiable(q, k, v, attn_mask, -1.0 - options, scale=softmax_scale)
        if results[4] == extension.MARK:
            out = results[0]
            return out
        extension.forward = None
    except RuntimeError as error:
        raise_out_of_memory(error)
    return None


def _autocast_changes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    device = "cuda" if q.is_cuda else "cpu"
    kept = torch.float64, torch.get_autocast_dtype(device)
    return torch.is_autocast_enabled(device) and not (q.dtype == k.dtype == v.dtype and q.dtype in kept)


class PlainAttention(torch.autograd.Function):
    """As `autograd.Attention`, which other calls have, but lse stays inside: a result costs more than to be saved."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: tuple[float | None, int]) -> Tensor | None:
        out, lse = _forward(q, k, v, *settings)
        if out is None:
            return None
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, out, lse)
        return out  # type: ignore[no-any-return] # and no cast, which is a call

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None:
            return (None,) * 4
        q, k, v, out, lse = ctx.saved_tensors
        if (
            ctx.needs_input_grad == _ALL
            and type(dout) is type(q) is type(k) is type(v) is type(out) is type(lse) is Tensor  # as hooks return them
            and not (torch.compiler.is_compiling() or torch.is_grad_enabled() or private.ops_are_watched())
            and not has_torch_function((dout,))
        ):
            try:
                return (*_backward(dout, q, k, v, out, lse, *ctx.settings), None)
            except RuntimeError as error:
                raise_out_of_memory(error)
                raise
        gradients = call_backward(*_of_backward(dout, q, k, v, out, lse, ctx.needs_input_grad[:3], *ctx.settings))
        return (*gradients[:3], None)


_apply = private.apply_of(PlainAttention)


def _of_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...],
    softmax_scale: float | None,
    options: int,
) -> tuple[Any, ...]:
    """Arguments of the backward op that everybody knows."""
    padded = [*needs, *(False,) * (NUM_DIFFERENTIABLE - 3)]
    return (dout, None, q, k, v, *_NOT_GIVEN, out, lse, padded, *from_plain(q, k, softmax_scale, options))


def _forward_of_older_vmap(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, options: int
) -> tuple[Tensor, Tensor]:
    """For `torch.autograd.grad(..., is_grads_batched=True)`, which torch does not tell of."""
    arguments = (q, k, v, *_NOT_GIVEN, *from_plain(q, k, softmax_scale, options))
    return cast(tuple[Tensor, Tensor], forward_op(*arguments)[:2])


def _backward_of_older_vmap(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float | None, options: int
) -> tuple[Tensor | None, ...]:
    """As `_forward_of_older_vmap`."""
    arguments = _of_backward(dout, q, k, v, out, lse, _ALL[:3], softmax_scale, options)
    return cast(tuple[Tensor | None, ...], backward_op(*arguments)[:3])


if private.older_vmap:
    registrations().impl(plain_forward_op, _forward_of_older_vmap, "Batched")
    registrations().impl(plain_backward_op, _backward_of_older_vmap, "Batched")
