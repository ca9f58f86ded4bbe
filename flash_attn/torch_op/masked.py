"""Eager calls of q, k, v and a mask alone, as in most training with masks: what nobody needs is not asked."""

from __future__ import annotations

import torch
from torch import Tensor

from . import plain, private
from .arguments import NUM_TENSORS, Options, Tensors
from .autograd import apply_attention, call_forward

_is_grad_enabled, _is_deterministic = torch.is_grad_enabled, private.is_deterministic
_NOT_GIVEN = (None,) * (NUM_TENSORS - 4)


def try_attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, softmax_scale: float | None, causal: int
) -> Tensor | None:
    """As `plain.try_attend`, heads first, with a mask. Takes q, k and v of one batch size and one number of heads."""
    shape, shape_k = q.shape, k.shape
    if (
        len(shape) != 4
        or attn_mask.dim() != 4
        or shape[:2] != shape_k[:2]
        or shape_k[:3] != v.shape[:3]
        or not plain.may_take(q, k, v)
        or not (attn_mask.dtype is torch.bool or attn_mask.dtype is q.dtype)
    ):
        return None
    options = Options(shape[2], shape_k[2], softmax_scale, causal, -1, -1, 0.0, 0.0, True, _is_deterministic())
    tensors = Tensors(q, k, v, attn_mask, *_NOT_GIVEN)
    try:
        if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or attn_mask.requires_grad):
            return apply_attention(tensors, options)[0]
        return call_forward(*tensors, *options)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
