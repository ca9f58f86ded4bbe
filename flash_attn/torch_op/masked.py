"""Eager calls of q, k, v and a mask alone, as in most training with masks: what nobody needs is not asked."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension, plain, private
from .arguments import PLAIN_DETERMINISTIC, PLAIN_WITHOUT_LSE
from .autograd import raise_out_of_memory

_is_grad_enabled, _is_deterministic = torch.is_grad_enabled, private.is_deterministic


def try_attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, softmax_scale: float | None, options: int
) -> Tensor | None:
    """As `plain.try_attend`, with a mask that broadcasts to the scores, by the op for extensions alone.

    None too for a mask that autocast might change, or whose gradient torch takes to lie in memory as ours does not.
    """
    if (
        not (attn_mask.dtype is torch.bool or attn_mask.dtype is q.dtype)
        or extension.forward is None
        or not plain.may_take(q, k, v)
    ):
        return None
    if not (_is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or attn_mask.requires_grad)):
        options |= PLAIN_WITHOUT_LSE
    elif q.numel() > extension.LARGEST:
        return None
    elif attn_mask.requires_grad and not (attn_mask.dim() == 4 and attn_mask.is_contiguous()):
        return None
    elif _is_deterministic():
        options |= PLAIN_DETERMINISTIC
    try:
        return extension.attend(q, k, v, attn_mask, softmax_scale, options)
    except RuntimeError as error:
        raise_out_of_memory(error)
        return None
