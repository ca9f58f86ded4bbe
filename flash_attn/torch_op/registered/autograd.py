"""Derivatives of `flash_attn::forward`, in two ways that share their formula.

In eager mode (`Attention`) a thin `autograd.Function` that calls the op below autograd: it costs least, but neither
Dynamo nor functorch can look into it. Through the dispatcher (`levels`) for all that looks at ops: whoever calls them,
AOTAutograd, function transforms, forward mode, and derivatives of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .. import private
from ..arguments import NUM_DIFFERENTIABLE, NUM_TENSORS, Options, Tensors
from ..library import backward_op, forward_op

Results = tuple[Tensor, Tensor, Tensor | None]  # out, lse, rng_state where there is dropout
Gradients = tuple[Tensor | None, ...]


def call_op(op: Any, *arguments: Any) -> Any:
    """Calls an op below autograd; running out of memory raises what torch raises for it."""
    try:
        with private.below_autograd():
            return op(*arguments)
    except RuntimeError as error:
        raise_out_of_memory(error)
        raise


def raise_out_of_memory(error: RuntimeError) -> None:
    """In place of an op's error that says so."""
    if "out of memory: flash_attn" in str(error):
        raise torch.OutOfMemoryError(str(error)) from None


_forward, _backward = private.past_torch_function(forward_op), private.past_torch_function(backward_op)


def call_forward(*arguments: Any) -> Results:
    return cast(Results, call_op(forward_op if has_torch_function(arguments) else _forward, *arguments))


def call_backward(*arguments: Any) -> Gradients:
    """The backward op in a node's backward pass."""
    # With create_graph, or a tangent of dout, gradients have derivatives; and compiled autograd traces this function.
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or private.transforms_active():
        return cast(Gradients, backward_op(*arguments))
    return cast(Gradients, call_op(backward_op if has_torch_function(arguments) else _backward, *arguments))


def requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator would cost more than the rest
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def save(ctx: Any, options: Options, tensors: Sequence[Tensor | None], results: Results) -> None:
    out, lse, rng_used = results
    ctx.set_materialize_grads(False)
    ctx.options = options
    if rng_used is not None:  # not the one that was given: a checkpoint that kept the results has drawn another since
        tensors = (*tensors[:-1], rng_used)
    ctx.save_for_backward(*tensors, out, lse)


def saveable(x: Tensor | None) -> Tensor | None:
    """Inference tensors can't be saved for backward: of masks, slopes, lengths and seeds that are such, a copy is."""
    if x is None or x.requires_grad or not x.is_inference():
        return x
    once = x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]  # what is broadcast stays so
    return once.clone().expand(x.shape)


def backward_arguments(ctx: Any, dout: Tensor | None, dlse: Tensor | None, needs: list[bool]) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if dout is None:  # only lse was used
        dout = torch.zeros_like(out)
    return (dout, dlse, *_padded(tensors), out, lse, needs, *ctx.options)


def _padded(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*tensors, *(None,) * (NUM_TENSORS - len(tensors)))


class Attention(torch.autograd.Function):
    """The eager way: op below autograd, saved tensors, op below autograd. Called through `apply_attention`. Of q, k, v
    and a mask alone there is a shorter one (`plain`)."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        results = out, lse, _ = call_forward(*_padded(tensors), *options)
        save(ctx, options, tensors, results)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        given = len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return (None,) * given
        needs = list(ctx.needs_input_grad[1 : 1 + NUM_DIFFERENTIABLE])
        needs += [False] * (NUM_DIFFERENTIABLE - len(needs))
        gradients = call_backward(*backward_arguments(ctx, dout, dlse, needs))
        return (None, *gradients, *(None,) * (NUM_TENSORS - NUM_DIFFERENTIABLE))[:given]


_apply = private.apply_of(Attention)


def apply_attention(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """Forward as a node of the graph. Outside of function transforms alone."""
    given = NUM_TENSORS
    while tensors[given - 1] is None:  # torch spends time on every argument, so the last ones that are None stay away
        given -= 1
    if given == 3:
        return _apply(options, *tensors[:3])
    return _apply(options, *tensors[:3], *map(saveable, tensors[3:given]))
