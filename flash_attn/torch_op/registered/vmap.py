"""vmap rules of the ops: the mapped dimension is folded into the batch where one call then gives the same numbers,
and otherwise (packed sequences, dropout, gradients shared by the batch) the calls are made one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import private
from ..arguments import (
    NUM_BACKWARD_JVP_TENSORS,
    NUM_DIFFERENTIABLE,
    NUM_FORWARD_JVP_TENSORS,
    NUM_TENSORS,
    Options,
    Tensors,
    split_backward,
    split_backward_jvp,
    split_forward,
)
from ..library import backward_jvp_op, backward_op, forward_jvp_op, forward_op, registrations

Dims = Sequence[int | None]

_ATTN_MASK, _ALIBI_SLOPES, _SINKS, _PACKED_MASK, _SEQUSED_Q, _SEQUSED_K = map(
    Tensors._fields.index, ("attn_mask", "alibi_slopes", "sinks", "packed_mask", "seqused_q", "seqused_k")
)


def _foldable(tensors: Sequence[Tensor | None], dims: Dims, options: Options) -> bool:
    given = Tensors(*tensors)  # type: ignore[arg-type]
    packed = given.cu_seqlens_q is not None or given.cu_seqlens_k is not None
    # A packed mask can't be folded: it has to be the same for all.
    shared = given.packed_mask is None or (
        dims[_ATTN_MASK] is None and dims[_PACKED_MASK] is None and cast(Tensor, given.attn_mask).shape[0] == 1
    )
    return not packed and dims[_SINKS] is None and options.dropout_p == 0.0 and shared


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(batch, ...) with a mapped dimension somewhere, or none, to (size * batch, ...)."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_all(tensors: Sequence[Tensor | None], dims: Dims, size: int) -> list[Tensor | None]:
    """Forward's twelve tensors with the mapped dimension in the batch."""
    folded = list(tensors)
    q, q_dim = tensors[0], dims[0]
    assert q is not None
    batch = q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]
    for i in (0, 1, 2, _SEQUSED_Q, _SEQUSED_K):
        x = tensors[i]
        if x is not None:
            folded[i] = _fold(x, dims[i], size)
    mask, dim = tensors[_ATTN_MASK], dims[_ATTN_MASK]
    if mask is not None and not (dim is None and mask.shape[0] == 1):  # what is shared by all stays broadcast
        mask = mask.expand(size, *mask.shape) if dim is None else mask.movedim(dim, 0)
        folded[_ATTN_MASK] = mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)
    slopes, dim = tensors[_ALIBI_SLOPES], dims[_ALIBI_SLOPES]
    if slopes is not None and not (dim is None and slopes.dim() == 1):
        slopes = slopes.expand(size, *slopes.shape) if dim is None else slopes.movedim(dim, 0)
        if slopes.dim() == 2:
            slopes = slopes.unsqueeze(1)
        folded[_ALIBI_SLOPES] = slopes.expand(size, batch, slopes.shape[-1]).flatten(0, 1)
    return folded


def _one_by_one(function: Callable[..., Any], size: int, dims: Dims, tensors: Sequence[Tensor | None]) -> Any:
    results = []
    for i in range(size):
        slices = [x if x is None or dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)]
        results.append(function(*slices))
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)


def _forward(size: int, dims: Dims, *arguments: Any) -> Any:
    """Rule of forward: `dims` says where each argument is mapped. Returns (results, their dims)."""
    tensors, options = split_forward(arguments)
    dims = dims[:NUM_TENSORS]
    if not _foldable(tensors, dims, options):
        return _one_by_one(lambda *t: forward_op(*t, *options), size, dims, tensors)
    out, lse, _ = forward_op(*_fold_all(tensors, dims, size), *options)
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1)), None), (0, 0, None)


def _backward(size: int, dims: Dims, *arguments: Any) -> Any:
    """Rule of backward."""
    dout, dlse, given, out, lse, needs, options = split_backward(arguments)
    tensors, dims = (dout, dlse, *given, out, lse), dims[: NUM_TENSORS + 4]
    inputs, input_dims = tensors[2:-2], dims[2:-2]
    if any(needs[3:]) or not _foldable(inputs, input_dims, options):
        return _one_by_one(lambda *t: backward_op(*t, needs, *options), size, dims, tensors)
    folded = [None if x is None else _fold(x, dim, size) for x, dim in zip(tensors, dims, strict=True)]
    folded[2:-2] = _fold_all(inputs, input_dims, size)
    results = backward_op(*folded, needs, *options)
    gradients = tuple(None if x is None else x.unflatten(0, (size, -1)) for x in results)
    return gradients, tuple(None if x is None else 0 for x in gradients)


def _forward_jvp(size: int, dims: Dims, *arguments: Any) -> Any:
    """Rule of forward_jvp."""
    return _of_tangents(forward_jvp_op, 0, NUM_FORWARD_JVP_TENSORS, size, dims, arguments)


def _backward_jvp(size: int, dims: Dims, *arguments: Any) -> Any:
    """Rule of backward_jvp."""
    needs = split_backward_jvp(arguments).needs
    return _of_tangents(backward_jvp_op, 4, NUM_BACKWARD_JVP_TENSORS, size, dims, arguments, any(needs[3:]))


def _of_tangents(
    op: Any,
    first: int,
    count: int,
    size: int,
    dims: Dims,
    arguments: tuple[Any, ...],
    gradients_are_shared: bool = False,
) -> Any:
    """Of `count` tensors, the six tangents from `first` on, the inputs behind them; all others have a batch."""
    tensors, rest, dims = arguments[:count], arguments[count:], dims[:count]
    options = Options(*rest[-len(Options._fields) :])
    inputs = slice(first + NUM_DIFFERENTIABLE, first + NUM_DIFFERENTIABLE + NUM_TENSORS)
    shared = gradients_are_shared or any(x is not None for x in tensors[first + 3 : first + NUM_DIFFERENTIABLE])
    if shared or not _foldable(tensors[inputs], dims[inputs], options):
        return _one_by_one(lambda *t: op(*t, *rest), size, dims, tensors)
    folded: list[Tensor | None] = [
        x if x is None or inputs.start <= i < inputs.stop else _fold(x, dim, size)
        for i, (x, dim) in enumerate(zip(tensors, dims, strict=True))
    ]
    folded[inputs] = _fold_all(tensors[inputs], dims[inputs], size)
    results = tuple(None if x is None else x.unflatten(0, (size, -1)) for x in op(*folded, *rest))
    return results, tuple(None if x is None else 0 for x in results)


def _register(name: str, op: Any, rule: Callable[..., Any]) -> None:
    def of_vmap(info: Any, dims: Dims, *arguments: Any) -> Any:
        return rule(info.batch_size, dims, *arguments)

    def of_older_vmap(*arguments: Any) -> Any:
        """The rule for the vmap that `torch.autograd.grad(..., is_grads_batched=True)` has kept."""
        level, size, dims, plain = private.unwrap_batched(arguments)
        results, result_dims = rule(size, dims, *plain)
        return private.wrap_batched(results, result_dims, level)

    torch.library.register_vmap(f"flash_attn::{name}", of_vmap, lib=registrations())
    if private.older_vmap:
        registrations().impl(name, of_older_vmap, "Batched")


_register("forward", forward_op, _forward)
_register("backward", backward_op, _backward)
_register("forward_jvp", forward_jvp_op, _forward_jvp)
_register("backward_jvp", backward_jvp_op, _backward_jvp)
