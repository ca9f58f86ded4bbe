"""`replace_sdpa`: this package's function in place of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import handle_torch_function, has_torch_function

from .. import open_blocks
from ..open_blocks import any_is_open
from ..torch_op import plain
from ..torch_op.private import (
    constant_when_traced,
    flash_sdp_enabled,
    is_traced,
    jit_is_tracing,
    register_as_builtin,
    sdp_priority,
    torch_sdpa,
)
from . import aten, context_parallel
from . import attention as sdpa
from .arguments import Arguments
from .causal_bias import is_causal_bias

_OURS, _TORCHS, _BEFORE = range(3)

_lock = threading.Lock()
_process_wide = 0  # how many replacements hold for the whole process
_usual_priority = sdp_priority()
_CUDNN_FIRST = [
    backend.value
    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
]


class _Layer:
    """A function that stands in F over what stood there before, and how many need it there."""

    function: Any

    def __init__(self, before: Callable[..., Tensor]) -> None:
        self.before = before
        self.needed = 0
        self.function = _standing_over(before, self)
        self.function.layer = self


def _standing_over(before: Callable[..., Tensor], layer: _Layer | None = None) -> Callable[..., Tensor]:
    """Runs ours where it is replaced, and `before` elsewhere. Without a layer, ours always."""
    always = layer is None

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        runs = _choose(always)
        if runs == _OURS:
            standing = F.scaled_dot_product_attention is scaled_dot_product_attention
            if standing and not is_traced():
                out = plain.try_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
                if out is not None:
                    return out
            given = Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            if has_torch_function((query, key, value, attn_mask)):
                # Who looks out for torch's function compares with what stands in its place, not with ours.
                return sdpa.overridden(scaled_dot_product_attention, given)
            if not standing:
                context_parallel.refuse("scaled_dot_product_attention")
            return sdpa.attend(given)
        given = Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if runs == _TORCHS:
            return sdpa.call_torch(given)
        if not (torch.compiler.is_compiling() or layer is None or layer.needed):
            _put_back()
        return _call_before(before, scaled_dot_product_attention, given)

    scaled_dot_product_attention.__doc__ = sdpa.scaled_dot_product_attention.__doc__
    scaled_dot_product_attention.__qualname__ = scaled_dot_product_attention.__name__
    return scaled_dot_product_attention


def _call_before(before: Callable[..., Tensor], standing: Callable[..., Tensor], given: Arguments) -> Tensor:
    if is_causal_bias(given.attn_mask):  # it compares with what stands in F
        dispatch: Any = handle_torch_function
        before = functools.partial(dispatch, standing, given[:4])
    return before(*given[:6], scale=given.scale, enable_gqa=given.enable_gqa)


@constant_when_traced  # Dynamo can look neither into context variables nor behind locks
def _choose(always: bool) -> int:
    if not (_process_wide or any_is_open() or always):
        return _BEFORE
    # Comparisons with the kernels that `sdpa_kernel` asks for must stay true, and what torch.jit.trace and the ONNX
    # exporters record must be known wherever it is loaded.
    if not flash_sdp_enabled() or jit_is_tracing() or _exports_to_onnx():
        return _TORCHS
    priority = sdp_priority()
    usual = priority == _usual_priority or (priority[:4] == _CUDNN_FIRST and _torch_prefers_cudnn())
    return _OURS if usual or _flash_comes_first(priority) else _TORCHS


def _torch_prefers_cudnn() -> bool:
    """Whether this order may be torch's own choice: its first call on such a GPU puts cuDNN in front for good, and
    nobody has asked for that."""
    return torch.cuda.is_initialized() and _any_prefers_cudnn()


@functools.cache  # of what stays: to ask takes longer than the rest of a call
def _any_prefers_cudnn() -> bool:
    cuda = torch.cuda
    return any(cuda.get_device_capability(device) in ((9, 0), (10, 0)) for device in range(cuda.device_count()))


def _exports_to_onnx() -> bool:
    onnx: Any = sys.modules.get("torch.onnx")  # nobody exports who has not loaded it
    return onnx is not None and torch.compiler.is_compiling() and bool(onnx.is_in_onnx_export())


def _flash_comes_first(priority: list[int]) -> bool:
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION.value: True,
        SDPBackend.MATH.value: cuda.math_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION.value: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION.value: cuda.cudnn_sdp_enabled(),
    }
    flash = SDPBackend.FLASH_ATTENTION.value
    return next((backend for backend in priority if enabled.get(backend)), flash) == flash


_in_traced_block = _standing_over(torch_sdpa)
_lowest = _Layer(torch_sdpa)
scaled_dot_product_attention = _lowest.function  # by this name it is pickled
register_as_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")


def _stand() -> _Layer:
    """Puts a function in place, unless one stands there. With the lock held."""
    current: Any = F.scaled_dot_product_attention
    layer: _Layer | None = getattr(current, "layer", None)
    if layer is None:
        if current is torch_sdpa:
            layer = _lowest
        else:
            context_parallel.refuse("replace_sdpa")
            layer = _Layer(current)
            layer.function.__module__ = F.__name__  # where pickle finds it as long as it stands there
        F.scaled_dot_product_attention = layer.function
    layer.needed += 1
    return layer


def _unstack() -> None:
    """Takes away what nobody needs. With the lock held.

    What lies below a function of others comes to light once they take that away, and is taken away when it is called.
    """
    layer: _Layer | None
    while (layer := getattr(F.scaled_dot_product_attention, "layer", None)) is not None and layer.needed == 0:
        F.scaled_dot_product_attention = layer.before  # type: ignore[assignment]


def _put_back() -> None:
    with _lock:
        _unstack()


class replace_sdpa:  # noqa: N801 - used as a function
    """Puts this package's function in place of `torch.nn.functional.scaled_dot_product_attention`.

    ``replace_sdpa()`` does so for the whole process, until `restore` is called on the result.
    ``with replace_sdpa():`` does so until the block ends, in its thread or async task alone, with what that hands its
    context variables to, and in the backward passes that it runs: keep a backward pass that computes checkpointed
    layers again in the block. Threads that others start, as `nn.DataParallel` does, need the first way.

    What was there before is put back exactly once nobody needs the replacement. Torch's own function runs inside
    `torch.nn.attention.sdpa_kernel` without FLASH_ATTENTION or with another kernel before it, and is what
    `torch.jit` and the ONNX exporters record; compiled code keeps to what held when it was traced. Code that imported
    the function by name beforehand, the inference fast paths of `nn.TransformerEncoderLayer` and
    `nn.MultiheadAttention`, and the latter with ``need_weights=True``, are not reached.

    ``level="aten"`` leaves the function alone and puts kernels of this package under the ops of torch that it calls,
    `aten::_scaled_dot_product_flash_attention` and its siblings for cuDNN, memory-efficient attention and the CPU. That
    reaches whatever calls them: the function imported by name, C++, compiled code, also what was compiled before or is
    run afterwards. What torch gives to none of its fused kernels stays torch's (float64 on CUDA, dropout on the CPU,
    v with another head dim there, `sdpa_kernel(MATH)`). It holds for the whole process, in a block too. Second
    derivatives raise in torch's words. Torch may warn that a kernel is registered over its own.

    Args:
        level: "function" (default) or "aten".

    Raises:
        NotImplementedError: torch's `context_parallel` is active; or with level "aten", torch's ops have changed.
        RuntimeError: level "aten" in a function that is being compiled.
        ValueError: another level.
    """

    def __init__(self, level: Literal["function", "aten"] = "function") -> None:
        if not isinstance(level, str) or level not in ("function", "aten"):
            raise ValueError(f"level must be 'function' or 'aten', but is {level!r}")
        self._level = level
        self._overrides: list[str] = []  # why kernels are under torch's ops: the process, or blocks
        self._layer: _Layer | None = None  # while it holds for the whole process
        self._blocks: list[tuple[open_blocks.Block, _Layer]] = []
        self._before: Any = None  # while it holds in code that is traced
        if level == "aten":
            self._override("process")
        else:
            self._begin()

    def _override(self, why: Literal["process", "block"]) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("replace_sdpa(level='aten') holds for the process: call it outside of compiled code")
        if "process" in self._overrides:  # a block that is entered takes its place
            self._overrides = [why]
        else:
            aten.override()
            self._overrides.append(why)

    def _begin(self) -> None:
        global _process_wide
        if torch.compiler.is_compiling():
            self._before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _in_traced_block
            return
        with _lock:
            self._layer = _stand()
            _process_wide += 1

    def restore(self) -> None:
        """Ends it, wherever it holds."""
        while self._overrides:
            self._leave_override()
        if self._before is not None:
            F.scaled_dot_product_attention, self._before = self._before, None
        self._end_process_wide()
        while self._blocks:
            self._leave(self._blocks[-1])

    def _leave_override(self) -> None:
        if self._overrides:  # unless `restore` ended the block before
            self._overrides.pop()
            aten.restore()

    def _end_process_wide(self) -> None:
        global _process_wide
        if self._layer is not None:
            with _lock:
                _process_wide -= 1
                self._layer.needed -= 1
                _unstack()
            self._layer = None

    def _leave(self, entered: tuple[open_blocks.Block, _Layer]) -> None:
        self._blocks.remove(entered)
        open_blocks.leave(entered[0])
        with _lock:
            entered[1].needed -= 1
            _unstack()

    def __enter__(self) -> replace_sdpa:
        if self._level == "aten":
            self._override("block")
            return self
        if torch.compiler.is_compiling():
            if self._before is None:
                self._begin()
            return self
        with _lock:
            layer = _stand()
        self._blocks.append((open_blocks.enter(), layer))
        self._end_process_wide()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._level == "aten":
            self._leave_override()
            return
        if self._before is not None:
            F.scaled_dot_product_attention, self._before = self._before, None
            return
        here = open_blocks.entered_here()
        entered = [entry for entry in self._blocks if entry[0] in here] or self._blocks
        if entered:
            self._leave(entered[-1])
