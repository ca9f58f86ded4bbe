"""Names of Dao's flash_attn that this package lacks, each with a sentence on what to use instead.

The table is all there is to it: a name that comes into being leaves it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_NORM = "use torch.nn.RMSNorm or torch.nn.LayerNorm, under torch.compile"
_MLP = "use torch.nn.Linear and torch's activations, under torch.compile"
_MHA = "flash_attn.FlashMHA is multi-head attention with its projections; its arguments have names of its own"
_LOSS = "use torch.nn.functional.cross_entropy, under torch.compile, or the package liger-kernel"

# Modules and functions alike, without the leading "flash_attn."
INSTEAD = {
    "cute": "it is a distribution of its own, which lies beside this one: pip install flash-attn-4",
    "flash_attn_triton": "its bias is attn_mask of flash_attn.scaled_dot_product_attention",
    "layers.patch_embed": "use torch.nn.Conv2d with its stride equal to its kernel size",
    "losses": _LOSS,
    "models": "there are attention functions and flash_attn.FlashMHA here, and no models; transformers has them",
    "modules.block": "use torch.nn.TransformerEncoderLayer, or a module of your own around flash_attn.FlashMHA",
    "modules.embedding": "use torch.nn.Embedding",
    "modules.mha.CrossAttention": "use FlashCrossAttention of the same module",
    "modules.mha.MHA": _MHA,
    "modules.mha.ParallelMHA": _MHA,
    "modules.mha.SelfAttention": "use FlashSelfAttention of the same module",
    "modules.mlp": _MLP,
    "ops.activations": _MLP,
    "ops.fused_dense": _MLP,
    "ops.layer_norm": _NORM,
    "ops.rms_norm": _NORM,
    "ops.triton.cross_entropy": _LOSS,
    "ops.triton.layer_norm": _NORM,
    "ops.triton.linear": _MLP,
    "ops.triton.mlp": _MLP,
    "utils": "torch has its own: torch.distributed, torch.utils.benchmark",
}


def explanation(name: str) -> str | None:
    """Why `flash_attn.<name>` is not there and what to use instead; None for a name that Dao's lacks as well."""
    return f"this flash_attn has no flash_attn.{name}: {INSTEAD[name]}" if name in INSTEAD else None


class _MissingNames(MetaPathFinder):
    """Stands last on `sys.meta_path`, so that it is asked only for what is nowhere else."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if not fullname.startswith("flash_attn."):
            return
        if text := explanation(fullname.removeprefix("flash_attn.").removeprefix("flash_attn_interface.")):
            # Without `name`: `from flash_attn import ...` drops the error that names what it looked for.
            raise ModuleNotFoundError(text)


def explain_imports() -> None:
    """From now on an import of what is missing says so. A second call changes nothing."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path.append(_MissingNames())
