"""The rotary ops: `rotary`, with its derivative, and `rotary_` in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import private
from .library import dense_strides_like, registrations
from .registered.refusals import refuse_named

rotary_op = torch.ops.flash_attn.rotary.default
rotary_in_place_op = torch.ops.flash_attn.rotary_.default


_NAMES = ("x", "cos", "sin", "offsets", "cu_seqlens", "offset", "interleaved", "conjugate")
"""Of the arguments of both, csrc/ops/arguments/rotary_arguments.h."""


@torch.library.register_fake("flash_attn::rotary", lib=registrations())
def _fake(x: Tensor, *others: Any) -> Tensor:
    refuse_named("check_rotary", dict(zip(_NAMES, (x, *others), strict=True)))
    return x.new_empty_strided(x.shape, dense_strides_like(x, x.shape[-1]))


@torch.library.register_fake("flash_attn::rotary_", lib=registrations())
def _in_place_fake(*arguments: Any) -> None:
    refuse_named("check_rotary", dict(zip(_NAMES, arguments, strict=True)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, offsets, cu_seqlens, *ctx.options = inputs
    if cos.requires_grad or sin.requires_grad:
        raise NotImplementedError("derivative for flash_attn::rotary in cos and sin is not implemented")
    ctx.save_for_backward(cos, sin, offsets, cu_seqlens)


def _turn_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    offset, interleaved, conjugate = ctx.options
    back = rotary_op(gradient, *ctx.saved_tensors, offset, interleaved, not conjugate)
    return (back, *(None,) * (len(_NAMES) - 1))


torch.library.register_autograd("flash_attn::rotary", _turn_back, setup_context=_save, lib=registrations())
registrations().impl("rotary_", torch.library.fallthrough_kernel, "Autograd")  # `turn` differentiates


def _of_vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, *others: Any) -> tuple[Tensor, int]:
    """Sequences of a mapped x that all turn alike are more of a batch; else they are turned one by one."""
    if dims[0] is not None and all(dim is None for dim in dims[1:]) and others[2] is others[3] is None:
        x = x.movedim(dims[0], 0)
        return rotary_op(x.flatten(0, 1), *others).unflatten(0, x.shape[:2]), 0
    each = [
        rotary_op(*(y if dim is None else y.select(dim, i) for y, dim in zip((x, *others), dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return torch.stack(each), 0


torch.library.register_vmap("flash_attn::rotary", _of_vmap, lib=registrations())


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Any) -> Tensor:
        _save(ctx, (x, *others), x)
        rotary_in_place_op(x, *others)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _turn_back(ctx, gradient)


def turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
    inplace: bool,
) -> Tensor:
    """Rows of x turned to their positions (csrc/row_copies.h).

    Args:
        x: (batch, seqlen, heads, head_dim), with cu_seqlens (total, heads, head_dim).
        cos: (positions, rotary_dim / 2), of x's dtype or float32.
        sin: as cos.
        offsets: (batch) int32, the position of each sequence's first row, beside ``offset``.
        cu_seqlens: (batch + 1) int32. Rows behind the last sequence stay as they are.
        offset: position of the first rows.
        interleaved: pairs are neighbours instead of halves.
        conjugate: turns back.
        inplace: writes into x.

    Returns:
        x turned, in x's memory order; x itself where inplace.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or there are fewer positions than rows.
    """
    others = (cos, sin, offsets, cu_seqlens, offset, interleaved, conjugate)
    if not inplace:
        return rotary_op(x, *others)
    if torch.compiler.is_compiling() or private.transforms_active() or x.is_neg():
        return x.copy_(rotary_op(x, *others))
    if torch.is_grad_enabled() and (x.requires_grad or cos.requires_grad or sin.requires_grad):
        return private.apply_of(_InPlace)(x, *others)
    rotary_in_place_op(x, *others)
    torch.autograd.graph.increment_version(x)
    return x
