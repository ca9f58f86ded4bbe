"""Derivatives of `flash_attn::forward`, in two ways that share their formula.

Through the dispatcher (`Forward`, `Backward`: kernels under the Autograd key) for all that looks at ops: whoever calls
them, AOTAutograd, function transforms, forward mode. In eager mode (`Attention`) a thin `autograd.Function` that calls
the op below autograd: it costs least, but neither Dynamo nor functorch can look into it.

There is no second derivative and no forward mode: both raise, and are never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import has_torch_function

from .. import private
from ..arguments import NUM_DIFFERENTIABLE, NUM_TENSORS, Options, Tensors, split_forward
from ..library import backward_op, forward_op, registrations

Results = tuple[Tensor, Tensor, Tensor | None]  # out, lse, rng_state where there is dropout
Gradients = tuple[Tensor | None, ...]

_NO_DOUBLE_BACKWARD = (
    "derivative for flash_attn::backward is not implemented: the backward pass was differentiated (create_graph=True, "
    "or nested grad), and flash_attn has no second derivative. "
    "Use torch.nn.attention.sdpa_kernel(SDPBackend.MATH) with torch's own function where you need one"
)
_NO_FORWARD_MODE = (
    "Trying to use forward AD with flash_attn::{} that does not support it because it has not been implemented yet: "
    "flash_attn has no forward-mode derivative (jvp, jacfwd, forward_ad). "
    "Use reverse mode, or torch.nn.attention.sdpa_kernel(SDPBackend.MATH) with torch's own function"
)


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
    # With create_graph, or a tangent of dout, the gradients' own derivative must raise, not be zero; and compiled
    # autograd traces this function.
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


def _save(ctx: Any, options: Options, tensors: Sequence[Tensor | None], results: Results) -> None:
    out, lse, rng_used = results
    ctx.set_materialize_grads(False)
    ctx.options = options
    if rng_used is not None:  # not the one that was given: a checkpoint that kept the results has drawn another since
        tensors = (*tensors[:-1], rng_used)
    ctx.save_for_backward(*tensors, out, lse)


def _saveable(x: Tensor | None) -> Tensor | None:
    """Inference tensors can't be saved for backward: of masks, slopes, lengths and seeds that are such, a copy is."""
    if x is None or x.requires_grad or not x.is_inference():
        return x
    once = x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]  # what is broadcast stays so
    return once.clone().expand(x.shape)


def _backward_arguments(ctx: Any, dout: Tensor | None, dlse: Tensor | None, needs: list[bool]) -> tuple[Any, ...]:
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
        _save(ctx, options, tensors, results)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
        given = len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return (None,) * given
        needs = list(ctx.needs_input_grad[1 : 1 + NUM_DIFFERENTIABLE])
        needs += [False] * (NUM_DIFFERENTIABLE - len(needs))
        gradients = call_backward(*_backward_arguments(ctx, dout, dlse, needs))
        return (None, *gradients, *(None,) * (NUM_TENSORS - NUM_DIFFERENTIABLE))[:given]


_apply = private.apply_of(Attention)


def apply_attention(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """Forward as a node of the graph. Outside of function transforms alone."""
    given = NUM_TENSORS
    while tensors[given - 1] is None:  # torch spends time on every argument, so the last ones that are None stay away
        given -= 1
    if given == 3:
        return _apply(options, *tensors[:3])
    return _apply(options, *tensors[:3], *map(_saveable, tensors[3:given]))


class Forward(private.SingleLevelFunction):  # type: ignore[misc]
    """Forward at one level of derivatives (that of plain autograd, of one functorch transform): it calls the op again,
    which the next level sees."""

    @staticmethod
    def forward(*arguments: Any) -> Results:
        with torch.enable_grad(), private.forward_mode_enabled():  # a Function turns both off, for all levels
            return call_op(forward_op, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        tensors, options = split_forward(inputs)
        _save(ctx, options, (*tensors[:3], *map(_saveable, tensors[3:])), output)
        if output[2] is not None:
            ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> Gradients:
        given = len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return (None,) * given
        arguments = _backward_arguments(ctx, dout, dlse, list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE]))
        return (*backward_op(*arguments), *(None,) * (given - NUM_DIFFERENTIABLE))

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE.format("forward"))


class Backward(private.SingleLevelFunction):  # type: ignore[misc]
    """The backward op at one level of derivatives: a node, so that its own derivative raises."""

    @staticmethod
    def forward(*arguments: Any) -> Gradients:
        with torch.enable_grad(), private.forward_mode_enabled():
            return call_op(backward_op, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> Any:
        raise NotImplementedError(_NO_DOUBLE_BACKWARD)

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE.format("backward"))


def _at_one_level(function: Any, op: Any, tensors: int) -> Callable[..., Any]:
    """A kernel under the Autograd key, of an op that begins with so many tensors."""
    apply = private.apply_of(function)

    def kernel(*arguments: Any) -> Any:
        if not private.transforms_active() and not requires_grad(arguments[:tensors]):  # as when compiled code runs
            return call_op(op, *arguments)
        with private.single_level():
            return apply(*arguments)

    return kernel


registrations().impl("forward", _at_one_level(Forward, forward_op, NUM_TENSORS), "Autograd")
registrations().impl("backward", _at_one_level(Backward, backward_op, NUM_TENSORS + 4), "Autograd")
