"""FLOPs of the ops, for `torch.utils.flop_counter.FlopCounterMode`.

A counter copies what is registered when it is made, so that our first call would be too late, and torch has no list
that can be added to before: the import system tells when the counter's module is loaded. To load it here would bring
Triton, which takes longer than the rest of this package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .. import extension
from ..arguments import Options, Tensors, split_backward, split_backward_jvp, split_forward, split_forward_jvp

_COUNTER = "torch.utils.flop_counter"


def _matmul_flops(tensors: Tensors, options: Options) -> int:
    """FLOPs of q @ k.T divided by head_dim, over all heads and sequences; masked scores count too, as in torch."""
    q, k, starts_q, starts_k = tensors.q, tensors.k, tensors.cu_seqlens_q, tensors.cu_seqlens_k
    heads = q.shape[1] if q.dim() == 3 or options.heads_first else q.shape[2]
    if starts_q is not None and starts_k is not None:
        scores = int((starts_q.diff().double() * starts_k.diff().double()).sum().item())
    else:
        batch = q.shape[0] if q.dim() == 4 else k.shape[0]
        scores = batch * options.max_seqlen_q * options.max_seqlen_k
    return 2 * heads * scores


def _forward_flops(*arguments: Any, out_val: Any = None) -> int:
    tensors, options = split_forward(arguments)
    return _matmul_flops(tensors, options) * (tensors.q.shape[-1] + tensors.v.shape[-1])


def _backward_flops(*arguments: Any, out_val: Any = None) -> int:
    _, _, tensors, _, _, _, options = split_backward(arguments)
    # q @ k.T again, dS @ k, dS.T @ q over head_dim; dout @ v.T, P.T @ dout over head_dim_v.
    return _matmul_flops(tensors, options) * (3 * tensors.q.shape[-1] + 2 * tensors.v.shape[-1])


def _forward_jvp_flops(*arguments: Any, out_val: Any = None) -> int:
    t, tensors, _, _, options = split_forward_jvp(arguments)
    # q @ k.T again and its tangent over head_dim; the tangent of P @ v over head_dim_v.
    of_scores, of_out = 1 + (t.q is not None) + (t.k is not None), 1 + (t.v is not None)
    return _matmul_flops(tensors, options) * (of_scores * tensors.q.shape[-1] + of_out * tensors.v.shape[-1])


def _backward_jvp_flops(*arguments: Any, out_val: Any = None) -> int:
    given = split_backward_jvp(arguments)
    t, tensors = given.tangents, given.tensors
    of_q, of_k, of_v, of_dout = (x is not None for x in (t.q, t.k, t.v, given.tdout))
    # q @ k.T and its tangent, the tangents of dS @ k and dS.T @ q; dout @ v.T and its tangent, that of P.T @ dout.
    by_head_dim, by_head_dim_v = 3 + 2 * of_q + 2 * of_k, 2 + of_v + 2 * of_dout
    return _matmul_flops(tensors, given.options) * (
        by_head_dim * tensors.q.shape[-1] + by_head_dim_v * tensors.v.shape[-1]
    )


def _extension_flops(*arguments: Any, out_val: Any = None, **options: Any) -> int:
    return 0 if arguments[0] is None else _backward_flops(*extension.of_backward(*arguments, **options))


def _register() -> None:
    counter: Any = sys.modules[_COUNTER]
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.flash_attn.forward: _forward_flops,
        torch.ops.flash_attn.backward: _backward_flops,
        torch.ops.flash_attn.forward_jvp: _forward_jvp_flops,
        torch.ops.flash_attn.backward_jvp: _backward_jvp_flops,
    }
    if extension.forward is not None:
        formulas[extension.backward_of_torch.overloadpacket] = _extension_flops
    for op, formula in formulas.items():
        if (
            getattr(counter.flop_registry.get(op), "__module__", __name__) == __name__
        ):  # nobody's, or an earlier import's
            counter.flop_registry.pop(op, None)
            counter.register_flop_formula(op, get_raw=True)(formula)


class _WhenLoaded(MetaPathFinder):
    """Stands first on `sys.meta_path` until the counter's module is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = execute_and_register
        return spec


sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]  # an earlier import's
if _COUNTER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenLoaded())
