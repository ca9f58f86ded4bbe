"""Exact attention in O(n) memory: `scaled_dot_product_attention`, the `flash_attn` functions, `FlashMHA`, `explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import missing
from .explain import Explanation, explain
from .functions.dense import flash_attn_func
from .functions.kvcache import KVCache, flash_attn_with_kvcache
from .functions.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .functions.varlen import flash_attn_varlen_func
from .masks.prepare import prepare_mask
from .masks.prepared import PreparedMask
from .mha import FlashMHA
from .portions import FOLDERS
from .sdpa.attention import scaled_dot_product_attention
from .sdpa.replacement import replace_sdpa

__version__ = "2.9.0"
__path__ = FOLDERS
missing.explain_imports()

__all__ = [
    "Explanation",
    "FlashMHA",
    "KVCache",
    "PreparedMask",
    "__version__",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "prepare_mask",
    "replace_sdpa",
    "scaled_dot_product_attention",
]

if not TYPE_CHECKING:  # type checkers would take every name for granted

    def __getattr__(name: str) -> None:
        raise AttributeError(missing.explanation(name) or f"module {__name__!r} has no attribute {name!r}")
