"""Everything of torch's without a public name that this package uses, and what serves where a name is gone.

Names are looked up once, at import: a call of what is found costs no more than a call of torch's own name.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # the name that its users are told


def _below_autograd() -> Callable[[], AbstractContextManager[None]]:
    if guard := getattr(torch._C, "_AutoDispatchBelowAutograd", None):
        return cast(Callable[[], AbstractContextManager[None]], guard)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradOther)
    for device in ("CPU", "CUDA", "Meta", "NestedTensor", "PrivateUse1"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autograd{device}"))
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


below_autograd = _below_autograd()
"""A context in which ops run without their autograd kernels."""


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What `function.apply` ends in when no function transform is active; the way there costs more than a small kernel.

    For use outside of function transforms alone.
    """
    return cast(Callable[..., Any], getattr(super(torch.autograd.Function, function), "apply", function.apply))


def _transforms_active() -> Callable[[], bool]:
    functorch: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
    if functorch is None or not hasattr(forward_ad, "_current_level"):
        return lambda: True
    return lambda: functorch() or forward_ad._current_level >= 0


transforms_active = _transforms_active()
"""Whether vmap, func.grad and the like, or a level of forward-mode derivatives, may see a call. True where torch does
not say: then all calls take the way that is right for any of them."""

flash_sdp_enabled: Callable[[], bool] = getattr(
    torch._C, "_get_flash_sdp_enabled", torch.backends.cuda.flash_sdp_enabled
)
"""Whether `torch.nn.attention.sdpa_kernel` lets FLASH_ATTENTION take part. Dynamo can't trace the public name."""


def compiler_is_loaded() -> bool:
    """Whether anything can have been compiled so far. Asking torch.compiler itself would load the compiler."""
    return "torch._dynamo" in sys.modules or importlib.util.find_spec("torch._dynamo") is None


def ragged_dim(x: Tensor) -> int:
    """The dimension of a jagged nested tensor whose size differs from entry to entry."""
    dim = getattr(x, "_ragged_idx", None)
    return next(i for i, n in enumerate(x.shape) if not isinstance(n, int)) if dim is None else cast(int, dim)


def longest(x: Any) -> int:
    """The longest entry of a jagged tensor without holes. Waits for the device unless the tensor remembers it."""
    remembered = getattr(x, "_get_max_seqlen", None)
    if remembered is not None:
        return int(remembered())
    return int(x.offsets().diff().max()) if x.offsets().numel() > 1 else 0
