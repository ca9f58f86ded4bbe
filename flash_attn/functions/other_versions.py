"""Keyword arguments that FlashAttention 3 and 4 have beyond those of 2.8.

Hints are checked and change nothing. What has no counterpart here is not among the named parameters of our functions,
so that who asks a signature gets the truth; it may be given with the value that turns it off.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypedDict

from torch import Tensor

from ..masks.prepared import PreparedMask
from ..torch_op import checks


class Extras(TypedDict, total=False):
    """Those that `flash_attn_func` takes."""

    learnable_sink: Tensor | None
    s_aux: Tensor | None
    num_splits: int
    pack_gqa: bool | None


class MaskExtras(Extras, total=False):
    """Those of `flash_attn_func`, which takes a mask too."""

    attn_mask: Tensor | PreparedMask | None


class VarlenExtras(Extras, total=False):
    """Those that `flash_attn_varlen_func` takes."""

    seqused_q: Tensor | None
    seqused_k: Tensor | None
    page_table: Tensor | None


_FUNCTIONS = (
    "a bias or a mask as a tensor is attn_mask of flash_attn_func, and functions are for "
    "torch.nn.attention.flex_attention"
)
_SCALES = "float8 is for caches of flash_attn_with_kvcache alone: convert, and multiply with the scale before"
_SCHEDULER = "kernels are scheduled by the package alone"

# name: (value that turns it off, what to do instead)
_MISSING: dict[str, tuple[Any, str]] = {
    "attention_chunk": (0, "give flash_attn_varlen_func a sequence for each chunk"),
    "aux_scalars": (None, _FUNCTIONS),
    "aux_tensors": (None, _FUNCTIONS),
    "block_sparse_tensors": (None, _FUNCTIONS),
    "block_sparse_tensors_bwd": (None, _FUNCTIONS),
    "disable_scheduler_metadata": (False, _SCHEDULER),
    "gather_kv_indices": (None, "gather the keys and values before"),
    "k_descale": (None, _SCALES),
    "mask_mod": (None, _FUNCTIONS),
    "min_seqlen_k": (None, "lengths are read from cu_seqlens_k and seqused_k alone"),
    "q_descale": (None, _SCALES),
    "qv": (None, "torch.cat((q, qv), -1) and torch.cat((k, v), -1) as q and k have the same scores"),
    "scheduler_metadata": (None, _SCHEDULER),
    "score_mod": (None, _FUNCTIONS),
    "score_mod_bwd": (None, _FUNCTIONS),
    "seqlen_k_per_split": (None, _SCHEDULER),
    "sm_margin": (0, "kernels take all multiprocessors that are free"),
    "v_descale": (None, _SCALES),
}

# The same of flash_attn_with_kvcache alone.
MISSING_WITH_CACHE: dict[str, tuple[Any, str]] = {
    "cu_seqlens_k_new": (None, "append as many rows to each sequence"),
    "cu_seqlens_q": (None, "flash_attn_varlen_func with block_table takes packed queries"),
    "max_seqlen_q": (None, "q has one length"),
    "rotary_seqlens": (None, "turn q and k before, with flash_attn.layers.rotary"),
}
# And of flash_attn_func.
MISSING_WITHOUT_CACHE: dict[str, tuple[Any, str]] = {
    "page_table": (None, "pages are for flash_attn_varlen_func and flash_attn_with_kvcache"),
}


def check_hints(num_splits: int, pack_gqa: bool | None) -> None:
    if checks.integer("num_splits", num_splits) < 0:
        raise ValueError(f"num_splits must be >= 0, but is {num_splits}")
    if pack_gqa is not None:
        checks.flag("pack_gqa", pack_gqa)


def refuse(function: str, given: dict[str, Any], more: Mapping[str, tuple[Any, str]] = MappingProxyType({})) -> None:
    """Raises unless everything in `given` is an argument of those versions and turned off.

    Raises:
        NotImplementedError: it is not turned off.
        TypeError: it is an argument of no version.
    """
    missing = {**_MISSING, **more}
    for name, value in given.items():
        if name not in missing:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        off, instead = missing[name]
        if value is not off and not (type(value) is type(off) and value == off):
            raise NotImplementedError(
                f"{name} must be {off} or left out, but is {checks.described(value)}, and is not supported: {instead}"
            )
