"""Autocast, as torch applies it to its own attention."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All that is floating but float64 in autocast's dtype for query's device; as it is where autocast is off."""
    device = "cuda" if query.is_cuda else "cpu"
    if query.is_meta or not torch.is_autocast_enabled(device):
        return (query, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (query, *others))
