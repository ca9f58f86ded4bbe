"""Exact attention in O(n) memory: `scaled_dot_product_attention`, the `flash_attn` functions, `FlashMHA`, `explain`."""

from __future__ import annotations

from .explain import Explanation, explain
from .interface import flash_attn_func, flash_attn_varlen_func
from .mha import FlashMHA
from .replacement import replace_sdpa
from .sdpa import scaled_dot_product_attention

__version__ = "3.0.0"

__all__ = [
    "Explanation",
    "FlashMHA",
    "__version__",
    "explain",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "replace_sdpa",
    "scaled_dot_product_attention",
]
