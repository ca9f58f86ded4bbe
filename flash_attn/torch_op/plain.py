"""The plain case: q, k and v alone, in eager mode. Small calls are mostly this, and cost what their arguments cost, so
they go to ops of five and eight arguments in place of 21 and 27.

Whoever looks at ops (dispatch modes, transforms, tracers, compiled autograd, subclasses) sees `flash_attn::forward` and
`flash_attn::backward` alone: callers ask before (`torch.compiler.is_compiling`, `ops_are_watched`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from . import private
from .arguments import NUM_DIFFERENTIABLE, NUM_TENSORS, from_plain, plain_options
from .autograd import call_backward, raise_out_of_memory
from .library import backward_op, plain_backward_op, plain_forward_op, registrations

_forward, _backward = (private.past_torch_function(op) for op in (plain_forward_op, plain_backward_op))
_NOT_GIVEN = (None,) * (NUM_TENSORS - 3)
_ALL = (True, True, True)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: int,
    heads_first: bool,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`flash_attn.torch_op.attention.attention`, of plain tensors of four dimensions on one device, while no
    torch function mode is active and nobody watches."""
    try:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            if deterministic is None:
                deterministic = torch.are_deterministic_algorithms_enabled()
            options = plain_options(causal, heads_first, deterministic)
            return cast(tuple[Tensor, Tensor], _apply(q, k, v, softmax_scale, options))
        # Only gradients ask for repeatable sums.
        return cast(tuple[Tensor, Tensor], _forward(q, k, v, softmax_scale, plain_options(causal, heads_first, False)))
    except RuntimeError as error:
        raise_out_of_memory(error)
        raise


class PlainAttention(torch.autograd.Function):
    """As `autograd.Attention`, which other calls have."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, options: int
    ) -> tuple[Tensor, Tensor]:
        out, lse = results = _forward(q, k, v, softmax_scale, options)
        ctx.set_materialize_grads(False)
        ctx.softmax_scale, ctx.options = softmax_scale, options
        ctx.save_for_backward(q, k, v, out, lse)
        return cast(tuple[Tensor, Tensor], results)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 5
        q, k, v, out, lse = ctx.saved_tensors
        if (
            dlse is None
            and ctx.needs_input_grad[:3] == _ALL
            and type(dout) is type(q) is type(k) is type(v) is type(out) is type(lse) is Tensor  # as hooks return them
            and not (torch.compiler.is_compiling() or torch.is_grad_enabled() or private.ops_are_watched())
            and not has_torch_function((dout,))
        ):
            try:
                return (*_backward(dout, q, k, v, out, lse, ctx.softmax_scale, ctx.options), None, None)
            except RuntimeError as error:
                raise_out_of_memory(error)
                raise
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        needs = ctx.needs_input_grad[:3]
        gradients = call_backward(*_of_backward(dout, dlse, q, k, v, out, lse, needs, ctx.softmax_scale, ctx.options))
        return (*gradients[:3], None, None)


_apply = private.apply_of(PlainAttention)


def _of_backward(
    dout: Tensor,
    dlse: Tensor | None,
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
    return (dout, dlse, q, k, v, *_NOT_GIVEN, out, lse, padded, *from_plain(q, k, softmax_scale, options))


def _backward_of_older_vmap(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float | None, options: int
) -> tuple[Tensor | None, ...]:
    """For `torch.autograd.grad(..., is_grads_batched=True)`, which torch does not tell of."""
    arguments = _of_backward(dout, None, q, k, v, out, lse, _ALL, softmax_scale, options)
    return cast(tuple[Tensor | None, ...], backward_op(*arguments)[:3])


if private.older_vmap:
    registrations().impl(plain_backward_op, _backward_of_older_vmap, "Batched")
