"""`torch.nn.attention.bias.CausalBias`, read without loading its module, which brings the compiler with it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias


def is_causal_bias(mask: object) -> TypeGuard[CausalBias]:
    if mask is None or type(mask) is Tensor:
        return False
    module = sys.modules.get("torch.nn.attention.bias")  # nobody has one who has not loaded it
    return module is not None and isinstance(mask, module.CausalBias)


def is_top_left(bias: CausalBias) -> bool:
    """Square ones are both."""
    return bias.seq_len_q == bias.seq_len_kv or bias.variant == type(bias.variant).UPPER_LEFT


def to_mask(bias: CausalBias, device: torch.device) -> Tensor:
    """(L, S), True where a row sees a column."""
    size, offset = (bias.seq_len_q, bias.seq_len_kv), bias.seq_len_kv - bias.seq_len_q
    return torch.ones(size, dtype=torch.bool, device=device).tril(0 if is_top_left(bias) else offset)
