"""Loads the op library with what is built beside it, and registers what torch needs to trace its two ops: fake
kernels."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flash_attn.portions import FOLDERS

from .arguments import NUM_DIFFERENTIABLE, Tensors, split_backward, split_forward
from .private import is_known, typical_value
from .registered.refusals import refuse_backward, refuse_forward

_PLACES = [Path(folder) / "lib" / "libflash_attn.so" for folder in FOLDERS]
LIBRARY = next((place for place in _PLACES if place.exists()), _PLACES[0])


def _load() -> Any:
    """The module small_calls."""
    beside = LIBRARY.with_name("small_calls.so")
    if missing := [file for file in (LIBRARY, beside) if not file.exists()]:
        raise ImportError(
            f"flash_attn: there is no library at {missing[0]}. This is the source folder, not the installed package: "
            "run `pip install .` and start Python from another folder, or `pip install -e .` to work in this one."
        )
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 11):
        raise ImportError(f"flash_attn needs torch >= 2.11, but torch {torch.__version__} is installed")
    torch.ops.load_library(LIBRARY)
    # By its place: the package may lie in another folder than what is built for it.
    spec = importlib.util.spec_from_file_location("small_calls", beside)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small_calls = _load()

is_grad_enabled_address = cast(
    int, ctypes.cast(ctypes.CDLL(str(LIBRARY)).aoti_torch_grad_mode_is_enabled, ctypes.c_void_p).value
)
"""Of a C function of torch's, `bool ()`, that says what `torch.is_grad_enabled()` does."""

forward_op = torch.ops.flash_attn.forward.default
backward_op = torch.ops.flash_attn.backward.default
forward_jvp_op = torch.ops.flash_attn.forward_jvp.default
backward_jvp_op = torch.ops.flash_attn.backward_jvp.default
pack_mask_op = torch.ops.flash_attn.pack_mask.default
unchanged_mask_op = torch.ops.flash_attn.unchanged_mask.default
plain_forward_op = torch.ops.flash_attn.plain_forward.default
masked_forward_op = torch.ops.flash_attn.masked_forward.default
plain_backward_op = torch.ops.flash_attn.plain_backward.default

_namespace: Any = torch.ops.flash_attn
if hasattr(_namespace, "registrations"):
    del _namespace.registrations  # of an import that was purged from sys.modules: this one takes its place
_namespace.registrations = torch.library.Library("flash_attn", "IMPL")


def registrations() -> torch.library.Library:
    """What this package registers with torch in Python. No module keeps it in a variable: what is registered keeps its
    module alive, which would then keep it registered."""
    return cast(torch.library.Library, _namespace.registrations)


for _plain in (plain_forward_op, masked_forward_op, plain_backward_op):  # their caller differentiates
    registrations().impl(_plain, torch.library.fallthrough_kernel, "Autograd")


def dense_strides_like(like: Tensor, last: int) -> list[int]:
    """Strides of a dense tensor of `like`'s sizes but `last` columns, in its memory order (csrc/ops/tensor_info.h)."""
    sizes, strides = like.shape, list(like.stride())
    if not all(is_known(n) for n in (*sizes, *strides)):
        strides = [typical_value(n) for n in strides]
    order = list(reversed(range(like.dim() - 1)))  # innermost first, sorted as torch.empty_like sorts
    for i in range(1, len(order)):
        own = i
        for j in reversed(range(i)):
            inner, stride = strides[order[j]], strides[order[own]]
            if inner == 0 or stride == 0:
                continue
            if inner <= stride:
                break
            order[j], order[own] = order[own], order[j]
            own = j
    dense = [1] * like.dim()
    step = torch.sym_max(last, 1)
    for i in order:
        dense[i] = step
        step = step * torch.sym_max(sizes[i], 1)
    return dense


def empty_outputs(q: Tensor, v: Tensor, heads_first: bool, packed: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse of :func:`flash_attn.torch_op.attention.attention`, as the op would allocate them."""
    head_dim_v = v.shape[-1]
    out = q.new_empty_strided([*q.shape[:-1], head_dim_v], dense_strides_like(q, head_dim_v))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if packed:
        return out, q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)
    heads, rows = (1, 2) if heads_first else (2, 1)
    return out, q.new_empty((q.shape[0], q.shape[heads], q.shape[rows]), dtype=dtype)


@torch.library.register_fake("flash_attn::forward", lib=registrations())
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    tensors, options = split_forward(arguments)
    refuse_forward(tensors, options)
    out, lse = empty_outputs(tensors.q, tensors.v, options.heads_first, tensors.cu_seqlens_q is not None)
    if options.dropout_p == 0.0 or tensors.rng_state is None:
        return out, lse, None
    return out, lse, torch.empty_like(tensors.rng_state)


def empty_gradients(tensors: Tensors, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Uninitialised gradients of the differentiable tensors, as the op would allocate them; None: not needed."""
    gradients: list[Tensor | None] = []
    for x, need in zip(tensors[:3], needs, strict=False):
        assert x is not None
        gradients.append(x.new_empty_strided(x.shape, dense_strides_like(x, x.shape[-1])) if need else None)
    for y, need in zip(tensors[3:NUM_DIFFERENTIABLE], needs[3:], strict=False):
        gradients.append(torch.empty(y.shape, dtype=y.dtype, device=y.device) if need and y is not None else None)
    return tuple(gradients)


@torch.library.register_fake("flash_attn::backward", lib=registrations())
def _backward_fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    _, _, tensors, _, _, needs, _ = given = split_backward(arguments)
    refuse_backward(given)
    return empty_gradients(tensors, needs)
