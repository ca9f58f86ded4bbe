"""The short way of eager calls of q, k, v and perhaps a mask. Small calls are mostly these, and cost what their
arguments cost, so they go to ops of five to eight arguments in place of 22 and 28, or to torch's op for extensions.
csrc/small_calls.cpp decides, and calls: what it asks takes as long as a small kernel, and twice that in Python.

Whoever looks at ops (dispatch modes, transforms, tracers, compiled autograd, subclasses) sees `flash_attn::forward` and
`flash_attn::backward` alone: callers ask before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function, has_torch_function_variadic

from . import extension, private
from .arguments import (
    NONE,
    NUM_DIFFERENTIABLE,
    NUM_TENSORS,
    PLAIN_DETERMINISTIC,
    PLAIN_IF_THEY_FIT,
    PLAIN_SHARED_HEADS,
    PLAIN_WITHOUT_LSE,
    TOP_LEFT,
    from_plain,
    plain_options,
)
from .library import (
    backward_op,
    forward_op,
    is_grad_enabled_address,
    masked_forward_op,
    plain_backward_op,
    plain_forward_op,
    registrations,
    small_calls,
)
from .registered.autograd import call_backward, raise_out_of_memory

_forward, _masked_forward, _backward = (
    private.past_torch_function(op) for op in (plain_forward_op, masked_forward_op, plain_backward_op)
)
_NOT_GIVEN = (None,) * (NUM_TENSORS - 3)
_ALL = (True, True, True, False)  # of q, k, v and settings

try_attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None, int, float], Tensor | None]
try_attend = small_calls.try_attend
"""`try_attend(q, k, v, attn_mask, softmax_scale, options, dropout_p)`: the first result of
:func:`flash_attn.torch_op.attention.attention`, if an op takes these tensors as they are, here and now. They are of no
subclass, no torch function mode is active, Dynamo does not trace (:data:`flash_attn.torch_op.private.is_traced`), and
`options` are those of `plain_options`; gradients are repeatable where these or torch say so. The mask may have fewer
than four dimensions. Dropout is drawn from torch's generator.

Shapes, dtypes and devices are the op's to look at: that takes it a tenth of the time. Who gets None goes the long way,
which can do more, or says why nobody can. With `PLAIN_IF_THEY_FIT` among the options, where shapes do not fit."""

try_sdpa: Callable[[Tensor, Tensor, Tensor, Any, float, bool, float | None, bool], Tensor | None] = small_calls.try_sdpa
"""`try_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)`: the same of the arguments of
:func:`flash_attn.scaled_dot_product_attention`, whatever they are."""


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

_FULL, _CAUSAL = (plain_options(causal, True, False) | PLAIN_IF_THEY_FIT for causal in (NONE, TOP_LEFT))
small_calls.configure(
    Tensor,
    Parameter,
    torch.bool,
    *private.watchers,
    has_torch_function_variadic,
    private.any_autocast,
    _autocast_changes,
    private.is_deterministic,
    is_grad_enabled_address,
    globals(),
    vars(extension),
    extension.MARK,
    raise_out_of_memory,
    _FULL,
    _CAUSAL,
    PLAIN_SHARED_HEADS,
    PLAIN_WITHOUT_LSE,
    PLAIN_DETERMINISTIC,
)


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


def _masked_forward_of_older_vmap(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, softmax_scale: float | None, options: int
) -> tuple[Tensor, Tensor]:
    """As `_forward_of_older_vmap`."""
    arguments = (q, k, v, attn_mask, *_NOT_GIVEN[1:], *from_plain(q, k, softmax_scale, options))
    return cast(tuple[Tensor, Tensor], forward_op(*arguments)[:2])


def _backward_of_older_vmap(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float | None, options: int
) -> tuple[Tensor | None, ...]:
    """As `_forward_of_older_vmap`."""
    arguments = _of_backward(dout, q, k, v, out, lse, _ALL[:3], softmax_scale, options)
    return cast(tuple[Tensor | None, ...], backward_op(*arguments)[:3])


if private.older_vmap:
    registrations().impl(plain_forward_op, _forward_of_older_vmap, "Batched")
    registrations().impl(masked_forward_op, _masked_forward_of_older_vmap, "Batched")
    registrations().impl(plain_backward_op, _backward_of_older_vmap, "Batched")
