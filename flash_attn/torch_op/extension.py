"""torch's op for attention of extension backends, with our kernels under it. Its derivative is torch's, in C++: an
`autograd.Function` costs more than a small kernel, forward as well as backward.

Large calls keep the function: when memory runs out in a backward pass without Python, nobody raises
torch.OutOfMemoryError, but torch a RuntimeError with the same text. Where gradients are differentiated in their turn,
`backward_of_extension` stands in for the op's own backward pass, which has no derivative.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import private
from .arguments import NUM_DIFFERENTIABLE, NUM_TENSORS, from_plain
from .library import LIBRARY, backward_op, registrations

_NAME = "_scaled_dot_product_fused_attention_overrideable"
_SCHEMAS = {  # that csrc/ops/extension.cpp is written for
    _NAME: "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias=None, float dropout_p=0., bool is_causal=False, "
    "bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, "
    "Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor philox_seed, Tensor philox_offset, Tensor debug_attn_mask)",
    _NAME + "_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor attn_bias, "
    "bool[4] grad_input_mask, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
    "SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed, Tensor philox_offset, *, float? scale=None) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_bias)",
}
MARK = 0x666C6173  # our kernel's fifth result: someone else may have put another kernel in its place since
LARGEST = 1 << 24  # elements of q: beyond that calls take the GPU longer than a host whose caches are cold
_OTHERS = (None,) * (NUM_TENSORS - 5)  # those between attn_mask and rng_state, which is the last

backward_of_torch: Any = getattr(getattr(torch.ops.aten, _NAME + "_backward", None), "default", None)

forward: Callable[..., Any] | None = None
"""`forward(q, k, v, mask, -1.0 - options - dropout_p[, scale=softmax_scale])`: our kernels find the options of the
plain ops, and dropout_p, which is less than 1, in what would be dropout_p. It returns out (None where the inputs should
fit and do not), lse, None, None, `MARK`, 0, the state of dropout and what nobody needs; without the mark another kernel
has answered. None where the op can't be used."""


def _add_kernels() -> bool:
    """Unless the op is another than the one we know, or someone else has kernels there."""
    added: set[str] = torch.ops.flash_attn.__dict__.setdefault("extended", set())  # by an earlier import too
    for device in {"CPU", "CUDA"} - added:
        if not private.is_free(_SCHEMAS, device):
            return False
        ctypes.CDLL(str(LIBRARY)).flash_attn_extend(device.encode())
        added.add(device)
    return True


def _fake_backward(*arguments: Any, scale: float | None = None) -> tuple[Tensor | None, ...]:
    """What compiled autograd traces: torch 2.11 has none of its own."""
    if arguments[0] is None:
        return (None,) * 4
    pairs = zip(arguments[1:5], arguments[5], strict=True)
    return tuple(torch.empty_like(x) if is_needed else None for x, is_needed in pairs)


def _add_fake_kernel() -> None:
    if not private.has_kernel(_NAME + "_backward", "Meta"):
        namespace: Any = torch.ops.flash_attn
        namespace.extension = library = torch.library.Library("aten", "IMPL")  # no module keeps it
        library.impl(_NAME + "_backward", _fake_backward, "Meta")


if os.environ.get("FLASH_ATTN_EXTENSION_OP") != "0" and _add_kernels():
    _add_fake_kernel()
    forward = private.past_torch_function(getattr(torch.ops.aten, _NAME).default)


def is_backward(op: Any, arguments: Sequence[Any]) -> bool:
    """Whether that is the backward pass of a call of `forward` with options, of a gradient that is there."""
    return op is backward_of_torch and op is not None and arguments[0] is not None and arguments[12] <= -1.0


def of_backward(*arguments: Any, scale: float | None = None) -> tuple[Any, ...]:
    """Arguments of `flash_attn::backward` that mean what the arguments of `backward_of_torch` do."""
    dout, q, k, v, attn_mask, wanted, out, lse = arguments[:8]
    needs = [*wanted, *(False,) * (NUM_DIFFERENTIABLE - 4)]
    carried = -1.0 - arguments[12]
    number = math.floor(carried)
    options = from_plain(q, k, scale, number)._replace(dropout_p=carried - number)
    rng_state = arguments[14] if options.dropout_p > 0.0 else None
    return (dout, None, q, k, v, attn_mask, *_OTHERS, rng_state, out, lse, needs, *options)


def _backward_of_extension(*arguments: Any, scale: float | None = None) -> tuple[Tensor | None, ...]:
    """`backward_of_torch` by the op that has a derivative."""
    dout, dlse, q, k, v, attn_mask, *rest = of_backward(*arguments, scale=scale)
    if dout is None:  # zero, to autograd
        return (None,) * 4
    as_given = attn_mask
    if attn_mask is not None:  # which may have fewer dimensions
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    dq, dk, dv, dmask, *_ = backward_op(dout, dlse, q, k, v, attn_mask, *rest)
    return dq, dk, dv, None if dmask is None else dmask.reshape(as_given.shape)


registrations().impl("backward_of_extension", _backward_of_extension, "CompositeImplicitAutograd")
