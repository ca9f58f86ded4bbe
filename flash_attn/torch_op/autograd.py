"""Derivatives of `flash_attn::forward`: eager, under function transforms, and through the dispatcher.

Three ways in, because each of torch's mechanisms lacks something: a thin `autograd.Function` costs least but neither
Dynamo nor functorch can look into it; a Function with `setup_context` and a vmap rule serves functorch and can refuse
forward mode; a kernel under the Autograd key serves whoever calls the op itself, AOTAutograd above all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import private, vmap
from .arguments import NUM_DIFFERENTIABLE, NUM_TENSORS, Options, Tensors, split_backward, split_forward
from .library import backward_op, forward_op

Gradients = tuple[Tensor | None, ...]

_NO_DOUBLE_BACKWARD = (
    "flash_attn has no second derivative: its backward pass was differentiated (create_graph=True, or nested grad). "
    "Use torch.nn.attention.sdpa_kernel(SDPBackend.MATH) with torch's own function where you need one"
)
_NO_FORWARD_MODE = (
    "flash_attn has no forward-mode derivative (jvp, jacfwd, forward_ad). "
    "Use reverse mode, or torch.nn.attention.sdpa_kernel(SDPBackend.MATH) with torch's own function"
)


def call_op(op: Any, *arguments: Any) -> Any:
    """Calls an op below autograd; running out of memory raises what torch raises for it."""
    try:
        with private.below_autograd():
            return op(*arguments)
    except RuntimeError as error:
        if "out of memory: flash_attn" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors[:NUM_DIFFERENTIABLE]:  # noqa: SIM110 - a generator would cost more than the rest
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _save(ctx: Any, options: Options, tensors: tuple[Tensor | None, ...], out: Tensor, lse: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.save_for_backward(*tensors, out, lse)


def _backward_args(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    """Of backward, up to needs: dout, dlse, tensors, out, lse."""
    *tensors, out, lse = ctx.saved_tensors
    if dout is None:  # only lse was used
        dout = torch.zeros_like(out)
    return (dout, dlse, *_padded(tensors), out, lse)


def _padded(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*tensors, *(None,) * (NUM_TENSORS - len(tensors)))


def _needs(ctx: Any) -> list[bool]:
    needs = list(ctx.needs_input_grad[1 : 1 + NUM_DIFFERENTIABLE])
    return needs + [False] * (NUM_DIFFERENTIABLE - len(needs))


def _of_inputs(ctx: Any, gradients: Gradients) -> Gradients:
    """Gradients of (options, *tensors), as many as were given."""
    return (None, *gradients, *(None,) * (NUM_TENSORS - NUM_DIFFERENTIABLE))[: len(ctx.needs_input_grad)]


class Attention(torch.autograd.Function):
    """The eager way: op below autograd, saved tensors, op below autograd. Called through `apply_attention`."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = call_op(forward_op, *_padded(tensors), *options)
        _save(ctx, options, tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        if dout is None and dlse is None:
            return _of_inputs(ctx, (None,) * NUM_DIFFERENTIABLE)
        arguments, needs = _backward_args(ctx, dout, dlse), _needs(ctx)
        if torch.is_grad_enabled():  # create_graph: the gradients' own derivative must raise, not be zero
            return _of_inputs(ctx, TransformedBackward.apply(ctx.options, needs, *arguments))
        return _of_inputs(ctx, call_op(backward_op, *arguments, needs, *ctx.options))


_apply = private.apply_of(Attention)


def apply_attention(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """Forward as a node of the graph. Outside of function transforms alone."""
    given = NUM_TENSORS
    while tensors[given - 1] is None:  # torch spends time on every argument, so the last ones that are None stay away
        given -= 1
    return _apply(options, *tensors[:given])


class TransformedAttention(torch.autograd.Function):
    """The same for functorch (grad, vmap and their nestings) and for forward mode, which it refuses."""

    @staticmethod
    def forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return call_op(forward_op, *tensors, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        options, *tensors = inputs
        _save(ctx, options, tuple(tensors), *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        if dout is None and dlse is None:
            return _of_inputs(ctx, (None,) * NUM_DIFFERENTIABLE)
        return _of_inputs(ctx, TransformedBackward.apply(ctx.options, _needs(ctx), *_backward_args(ctx, dout, dlse)))

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], options: Options, *tensors: Tensor | None) -> Any:
        return vmap.forward(TransformedAttention.apply, info.batch_size, in_dims[1:], tensors, options)


class TransformedBackward(torch.autograd.Function):
    """The backward op as a node of its own, so that a second derivative raises and vmap has its rule."""

    @staticmethod
    def forward(options: Options, needs: list[bool], *tensors: Tensor | None) -> Gradients:
        return call_op(backward_op, *tensors, needs, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        pass

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> Any:
        raise NotImplementedError(_NO_DOUBLE_BACKWARD)

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], options: Options, needs: list[bool], *tensors: Tensor | None) -> Any:
        return vmap.backward(TransformedBackward.apply, info.batch_size, in_dims[2:], tensors, options, needs)


def _forward_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, options = split_forward(arguments)
    if requires_grad(tensors):
        return apply_attention(tensors, options)
    return call_op(forward_op, *arguments)


def _backward_autograd(*arguments: Any) -> Gradients:
    dout, dlse, tensors, out, lse, needs, options = split_backward(arguments)
    inputs = (dout, dlse, *tensors, out, lse)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return TransformedBackward.apply(options, needs, *inputs)
    return call_op(backward_op, *arguments)


_library = torch.library.Library("flash_attn", "IMPL")
_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _backward_autograd, "Autograd")
