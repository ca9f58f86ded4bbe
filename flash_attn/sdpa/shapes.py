"""Shapes of `scaled_dot_product_attention`: leading dimensions, grouped heads and masks brought to four dimensions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..torch_op.private import torch_sdpa


def check_sizes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raises unless q is (..., L, E), k (..., S, E) and v (..., S, Ev), with heads before L and S for `enable_gqa`."""
    dims = min(query.dim(), key.dim(), value.dim())
    if dims < 2 or (enable_gqa and dims < 3):
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        if dims < 2:
            raise RuntimeError(
                f"Expected query, key, and value to all be at least 2 dimensional, but got shapes {shapes}"
            )
        raise IndexError(
            f"enable_gqa needs query, key and value with heads in dimension -3, but their shapes are {shapes}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            "query and key must have the same last dimension, but have shapes "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"key and value must have the same length, but have shapes {tuple(key.shape)} and {tuple(value.shape)}"
        )


def fit_as_they_are(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the op takes all three as (batch, heads, length, columns)."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    batch, heads = query.shape[:2]
    batch_k, heads_k = key.shape[:2]
    if batch_k != batch or value.shape[:2] != key.shape[:2]:
        return False
    return heads_k == heads or heads_k == 1 or (enable_gqa and heads_k > 0 and heads % heads_k == 0)


def _broadcasts_empty() -> bool:
    """Whether torch's function broadcasts leading dimensions where there are no keys, as it did up to 2.11."""
    query, key = (torch.empty(batch, 1, rows, 1, device="cpu") for batch, rows in ((1, 1), (2, 0)))
    return torch_sdpa(query, key, key).shape[0] == 2


_BROADCASTS_EMPTY = _broadcasts_empty()


def empty_result(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """Zeros, where no result depends on the inputs and torch then broadcasts no leading dimensions, and checks none."""
    if not _BROADCASTS_EMPTY and (query.shape[-2] == 0 or 0 in value.shape):
        zeros = query.new_zeros(*query.shape[:-1], value.shape[-1])
        return zeros + query[..., :0].sum() + key[..., :0].sum() + value[..., :0].sum()
    return None


def broadcast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """q, k and v as (batch, heads, length, columns), and the leading dimensions of the output."""
    shapes = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    try:
        lead = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise RuntimeError(
            "the leading dimensions of query, key and value must broadcast, but their shapes are "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}{_gqa_remedy(query, key, value)}"
        ) from None
    q, k, v = (_flatten(_expand(x, lead)) for x in (query, key, value))
    return q, k, v, lead


def _gqa_remedy(query: Tensor, key: Tensor, value: Tensor) -> str:
    """For heads that would fit if enable_gqa were given."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        return ""
    heads, heads_k, heads_v = query.shape[-3], key.shape[-3], value.shape[-3]
    if heads_k == heads_v == heads or heads_k == 0 or heads_v == 0 or heads % heads_k != 0 or heads % heads_v != 0:
        return ""
    try:
        torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        return ""
    return "; heads of key and value that are shared by several of query need enable_gqa=True"


def group(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """As `broadcast`, with heads of k and v that each divide those of q, and that come out equal."""
    heads, heads_k, heads_v = query.shape[-3], key.shape[-3], value.shape[-3]
    if heads_k == 0 or heads_v == 0 or heads % heads_k != 0 or heads % heads_v != 0:
        raise RuntimeError(
            f"with enable_gqa the heads of key and value must divide those of query, but they are {heads_k}, {heads_v} "
            f"and {heads}"
        )
    lead = tuple(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
    q, k, v = (_flatten(_expand(x, (*lead, x.shape[-3]))) for x in (query, key, value))
    if heads_k != heads_v:  # the op wants equal numbers: the larger one, if all of k's and v's heads divide it
        common = max(heads_k, heads_v)
        common = heads if common % heads_k != 0 or common % heads_v != 0 else common
        k, v = k.repeat_interleave(common // heads_k, 1), v.repeat_interleave(common // heads_v, 1)
    return q, k, v, (*lead, heads)


def _expand(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    return x if x.shape[:-2] == lead else x.expand(*lead, *x.shape[-2:])


def _flatten(x: Tensor) -> Tensor:
    """(..., heads, length, columns) to four dimensions."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x if x.dim() == 4 else x.flatten(0, -4)


def unflatten(out: Tensor, lead: tuple[int, ...], query: Tensor) -> Tensor:
    """out (batch, heads, L, Ev) to (*lead, L, Ev), in query's memory order if it has all of those dimensions."""
    out = out.reshape(*lead, *out.shape[-2:])
    if len(lead) <= 2 or query.shape[:-1] != out.shape[:-1]:
        return out
    order = memory_order(query)
    return out.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def memory_order(x: Tensor) -> list[int]:
    """Dimensions of x from the outermost in memory on; its last one stays last, and broadcast ones come first."""
    strides = [n or sys.maxsize for n in x.stride()]
    order: list[int] = []
    for i in range(x.dim() - 1):  # torch.compile can't sort by symbolic strides
        order.insert(sum(1 for j in order if strides[j] >= strides[i]), i)
    return [*order, x.dim() - 1]


def check_mask_shape(shape: Sequence[int], scores: Sequence[int]) -> None:
    """Raises unless a mask of that shape broadcasts to `scores`, which is (..., L, S)."""
    if len(shape) < 1:
        raise IndexError(f"attn_mask must have at least 1 dimension, but has shape {tuple(shape)}")
    fits = (
        len(shape) <= len(scores)
        and all(
            n == m or n == 1  # in this order for symbols; Dynamo answers `in` without asking what one is
            for n, m in zip(shape, scores[len(scores) - len(shape) :], strict=True)
        )
    )
    if not fits:
        padding = len(shape) == 2 and len(scores) == 4 and tuple(shape) == (scores[0], scores[-1])
        remedy = "; a padding mask (batch, S) is given as attn_mask[:, None, None, :]" if padding else ""
        raise RuntimeError(f"attn_mask must broadcast to {tuple(scores)}, but has shape {tuple(shape)}{remedy}")


def mask_to_four_dims(mask: Tensor, query: Tensor, scores: Sequence[int]) -> Tensor:
    """The mask as (batch | 1, heads | 1, L | 1, S | 1); `scores` is (..., L, S)."""
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise RuntimeError(
            f"attn_mask must be bool, float32 or query's dtype ({query.dtype}), but its dtype is {mask.dtype}"
        )
    if mask.device != query.device:
        raise RuntimeError(f"attn_mask must be on query's device ({query.device}), but is on {mask.device}")
    check_mask_shape(mask.shape, scores)
    shape = (1,) * (len(scores) - mask.dim()) + tuple(mask.shape)
    if len(shape) <= 4:
        return mask if mask.dim() == 4 else mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    mask, outer = mask.reshape(shape), len(shape) - 3
    if any(n != 1 for n in shape[:outer]):
        mask = mask.expand(*scores[:outer], *shape[outer:])
    return mask.flatten(0, outer - 1)
