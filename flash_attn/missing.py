"""Names of Dao's flash_attn that this package lacks, each with a sentence on what to use instead.

The table is all there is to it: a name that comes into being leaves it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_ROTARY = (
    "rotate q and k with torch before attention: x1, x2 = x.chunk(2, -1); x * cos + torch.cat((-x2, x1), -1) * sin"
)
_NORM = "use torch.nn.RMSNorm or torch.nn.LayerNorm, under torch.compile"
_MLP = "use torch.nn.Linear and torch's activations, under torch.compile"
_LOSS = "use torch.nn.functional.cross_entropy, under torch.compile, or the package liger-kernel"

# Modules and functions alike, without the leading "flash_attn."
INSTEAD = {
    "bert_padding": (
        "x[mask] packs a padded batch, F.pad(mask.sum(1).cumsum(0), (1, 0)).int() are its cu_seqlens, and "
        "torch.zeros_like(x).index_put((mask,), rows) pads it again"
    ),
    "cute": "it is a distribution of its own, which lies beside this one: pip install flash-attn-4",
    "flash_attn_interface": "its functions are in flash_attn itself: from flash_attn import flash_attn_func",
    "flash_attn_kvpacked_func": "use flash_attn_func(q, *kv.unbind(2), ...)",
    "flash_attn_qkvpacked_func": "use flash_attn_func(*qkv.unbind(2), ...)",
    "flash_attn_triton": "its bias is attn_mask of flash_attn.scaled_dot_product_attention",
    "flash_attn_varlen_kvpacked_func": "use flash_attn_varlen_func(q, *kv.unbind(1), ...)",
    "flash_attn_varlen_qkvpacked_func": (
        "use flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, ...)"
    ),
    "flash_attn_with_kvcache": (
        "write the new keys and values into the cache with torch, then call flash_attn_func on its filled part"
    ),
    "layers": f"{_ROTARY}; for patch_embed use torch.nn.Conv2d",
    "losses": _LOSS,
    "models": "there are attention functions and flash_attn.FlashMHA here, and no models; transformers has them",
    "modules": f"flash_attn.FlashMHA is multi-head attention with its projections; for mlp, block and embedding {_MLP}",
    "ops.activations": _MLP,
    "ops.fused_dense": _MLP,
    "ops.layer_norm": _NORM,
    "ops.rms_norm": _NORM,
    "ops.triton": f"for rotary, {_ROTARY}; for layer_norm, {_NORM}; for cross_entropy, {_LOSS}; for mlp, {_MLP}",
    "utils": "torch has its own: torch.distributed, torch.utils.benchmark",
}


def explanation(name: str) -> str | None:
    """Why `flash_attn.<name>` is not there and what to use instead; None for a name that Dao's lacks as well."""
    return f"this flash_attn has no flash_attn.{name}: {INSTEAD[name]}" if name in INSTEAD else None


class _MissingNames(MetaPathFinder):
    """Stands last on `sys.meta_path`, so that it is asked only for what is nowhere else."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname.startswith("flash_attn.") and (text := explanation(fullname.removeprefix("flash_attn."))):
            # Without `name`: `from flash_attn import ...` drops the error that names what it looked for.
            raise ModuleNotFoundError(text)


def explain_imports() -> None:
    """From now on an import of what is missing says so. A second call changes nothing."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path.append(_MissingNames())
