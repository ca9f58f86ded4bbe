"""Derivatives of the ops as the dispatcher has them: kernels under the Autograd key.

Each is an `autograd.Function` at one level of derivatives, that of plain autograd or of one transform of functorch. It
calls an op again, which the next level sees, and its own derivatives call ops that have such kernels too:

    forward       reverse: backward                    forward mode: forward_jvp
    backward      reverse: forward_jvp, backward_jvp   forward mode: backward_jvp
    forward_jvp   reverse: backward, backward_jvp
    backward_jvp  reverse, of tangents alone: forward_jvp, backward_jvp

Tangents are computed by ops of their own, `forward_jvp` and `backward_jvp` (`second_order/tangents.py`). What these
would have to be differentiated for, a third derivative or forward mode twice, raises, and is never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import private
from ..arguments import (
    NUM_BACKWARD_JVP_TENSORS,
    NUM_DIFFERENTIABLE,
    NUM_FORWARD_JVP_TENSORS,
    NUM_TENSORS,
    split_backward,
    split_backward_jvp,
    split_forward,
    split_forward_jvp,
)
from ..library import backward_jvp_op, backward_op, forward_jvp_op, forward_op, registrations
from .autograd import Gradients, Results, backward_arguments, call_op, requires_grad, save, saveable

_NO_THIRD = (
    "derivative for flash_attn::{} is not implemented: second derivatives of flash_attn have no derivatives of their "
    "own (a third derivative, or forward mode within forward mode). "
    "Use torch.nn.attention.sdpa_kernel(SDPBackend.MATH) with torch's own function where you need one"
)


class Forward(private.SingleLevelFunction):  # type: ignore[misc]
    @staticmethod
    def forward(*arguments: Any) -> Results:
        return cast(Results, _call_at_next_level(forward_op, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        tensors, options = split_forward(inputs)
        save(ctx, options, (*tensors[:3], *map(saveable, tensors[3:])), output)
        ctx.save_for_forward(*ctx.to_save)
        if output[2] is not None:
            ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> Gradients:
        given = len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return (None,) * given
        arguments = backward_arguments(ctx, dout, dlse, list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE]))
        return (*backward_op(*arguments), *(None,) * (given - NUM_DIFFERENTIABLE))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, None]:
        t = _floating(tangents[:NUM_DIFFERENTIABLE], ctx.saved_tensors)
        tout, tlse = forward_jvp_op(*t, *ctx.saved_tensors, *ctx.options)
        return tout, tlse, None


class Backward(private.SingleLevelFunction):  # type: ignore[misc]
    @staticmethod
    def forward(*arguments: Any) -> Gradients:
        return cast(Gradients, _call_at_next_level(backward_op, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        dout, dlse, tensors, out, lse, ctx.needs, ctx.options = split_backward(inputs)
        _save_for_both(ctx, dout, dlse, *tensors[:3], *map(saveable, tensors[3:]), out, lse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        given = len(ctx.needs_input_grad)
        if all(x is None for x in gradients):
            return (None,) * given
        dout, dlse, *saved = ctx.saved_tensors  # once: checkpointing insists
        needs = list(ctx.needs_input_grad[2 : 2 + NUM_DIFFERENTIABLE])
        tout, tlse = forward_jvp_op(*gradients, *saved, *ctx.options)
        second: Gradients = (None,) * NUM_DIFFERENTIABLE
        if any(needs):
            second = backward_jvp_op(dout, dlse, None, None, *gradients, *saved, tout, tlse, needs, *ctx.options)
        # out and lse get none: the formulas contain that they depend on the inputs.
        of_inputs = (tout, None if dlse is None else tlse, *second)
        return (*of_inputs, *(None,) * (given - len(of_inputs)))

    @staticmethod
    def jvp(ctx: Any, tdout: Tensor | None, tdlse: Tensor | None, *tangents: Any) -> Gradients:
        dout, dlse, *saved = ctx.saved_tensors
        t = _floating(tangents[:NUM_DIFFERENTIABLE], saved)
        tout, tlse = tangents[NUM_TENSORS : NUM_TENSORS + 2]
        arguments = dout, dlse, tdout, tdlse, *t, *saved, tout, tlse, ctx.needs, *ctx.options
        return cast(Gradients, backward_jvp_op(*arguments))


class ForwardJvp(private.SingleLevelFunction):  # type: ignore[misc]
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], _call_at_next_level(forward_jvp_op, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        t, tensors, out, lse, ctx.options = split_forward_jvp(inputs)
        _save_for_both(ctx, *t, *tensors[:3], *map(saveable, tensors[3:]), out, lse, *output)

    @staticmethod
    def backward(ctx: Any, dtout: Tensor | None, dtlse: Tensor | None) -> Any:
        given = len(ctx.needs_input_grad)
        if dtout is None and dtlse is None:
            return (None,) * given
        *rest, tout, tlse = ctx.saved_tensors
        t, saved = rest[:NUM_DIFFERENTIABLE], rest[NUM_DIFFERENTIABLE:]
        if dtout is None:
            dtout = torch.zeros_like(tout)
        of_tangents = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
        of_inputs = list(ctx.needs_input_grad[NUM_DIFFERENTIABLE : 2 * NUM_DIFFERENTIABLE])
        first, second = (None,) * NUM_DIFFERENTIABLE, (None,) * NUM_DIFFERENTIABLE
        if any(of_tangents):
            first = backward_op(dtout, dtlse, *saved, of_tangents, *ctx.options)
        if any(of_inputs):
            second = backward_jvp_op(dtout, dtlse, None, None, *t, *saved, tout, tlse, of_inputs, *ctx.options)
        return (*first, *second, *(None,) * (given - 2 * NUM_DIFFERENTIABLE))

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_THIRD.format("forward_jvp"))


class BackwardJvp(private.SingleLevelFunction):  # type: ignore[misc]
    """Linear in the tangents, and symmetric: so of these it has gradients, which `torch.autograd.functional.hvp` asks
    for. What else it depends on comes through `Third`."""

    @staticmethod
    def forward(*arguments: Any) -> Gradients:
        return cast(Gradients, _call_at_next_level(backward_jvp_op, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        given = split_backward_jvp(inputs)
        ctx.options = given.options
        tensors = (*given.tensors[:3], *map(saveable, given.tensors[3:]))
        _save_for_both(ctx, given.dout, given.dlse, *tensors, given.out, given.lse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        given = len(ctx.needs_input_grad)
        if all(x is None for x in gradients):
            return (None,) * given
        dout, dlse, *saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[4 : 4 + NUM_DIFFERENTIABLE])
        tout, tlse = forward_jvp_op(*gradients, *saved, *ctx.options)
        of_tangents = backward_jvp_op(dout, dlse, None, None, *gradients, *saved, tout, tlse, needs, *ctx.options)
        third = [dout.new_zeros(()).expand_as(x) if x is not None else None for x in (dout, dlse, *saved)]
        results = [*third[:2], tout, tlse, *of_tangents, *third[2:]]
        results += [None] * (given - len(results))  # the tangents of out and lse: contained in those of the inputs
        return tuple(x if need else None for x, need in zip(results, ctx.needs_input_grad, strict=True))

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_THIRD.format("backward_jvp"))


class Third(private.SingleLevelFunction):  # type: ignore[misc]
    """A tensor on which a second derivative depends: its own derivative raises."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        with torch.enable_grad(), private.forward_mode_enabled():
            return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor | None) -> None:  # type: ignore[override]
        if gradient is not None:
            raise NotImplementedError(_NO_THIRD.format("backward_jvp"))

    @staticmethod
    def jvp(ctx: FunctionCtx, tangent: Any) -> Any:
        raise NotImplementedError(_NO_THIRD.format("backward_jvp"))


def _call_at_next_level(op: Any, *arguments: Any) -> Any:
    """The op again, which the next level of derivatives sees."""
    with torch.enable_grad(), private.forward_mode_enabled():  # a Function turns both off, for all levels
        return call_op(op, *arguments)


def _save_for_both(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _floating(tangents: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Without what torch gives for a boolean mask."""
    return [
        t if x is not None and x.is_floating_point() else None
        for t, x in zip(tangents, tensors[:NUM_DIFFERENTIABLE], strict=True)
    ]


def _at_one_level(
    function: Any, op: Any, tensors: int, prepare: Callable[..., Any] = lambda *x: x
) -> Callable[..., Any]:
    """A kernel under the Autograd key, of an op that begins with so many tensors."""
    apply = private.apply_of(function)

    def kernel(*arguments: Any) -> Any:
        if not private.transforms_active() and not requires_grad(arguments[:tensors]):  # as when compiled code runs
            return call_op(op, *arguments)
        with private.single_level():
            return apply(*prepare(*arguments))

    return kernel


_third = private.apply_of(Third)


def _without_third(*arguments: Any) -> tuple[Any, ...]:
    """Arguments of backward_jvp, of which all but the tangents pass through `Third`."""
    first = 4 + NUM_DIFFERENTIABLE
    tangents = {*range(2, first), NUM_BACKWARD_JVP_TENSORS - 2, NUM_BACKWARD_JVP_TENSORS - 1}
    return tuple(
        _third(x) if isinstance(x, Tensor) and x.is_floating_point() and i not in tangents else x
        for i, x in enumerate(arguments)
    )


def _register(name: str, *level: Any) -> None:
    registrations().impl(name, _at_one_level(*level), "Autograd")


_register("forward", Forward, forward_op, NUM_TENSORS)
_register("backward", Backward, backward_op, NUM_TENSORS + 4)
_register("forward_jvp", ForwardJvp, forward_jvp_op, NUM_FORWARD_JVP_TENSORS)
_register("backward_jvp", BackwardJvp, backward_jvp_op, NUM_BACKWARD_JVP_TENSORS, _without_third)
