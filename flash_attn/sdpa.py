"""`scaled_dot_product_attention`, in place of torch's: the same inputs, the same values and gradients."""

from __future__ import annotations

import functools
import math
from types import TracebackType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function

from . import ops, tensor_subclasses

_torch_sdpa = F.scaled_dot_product_attention

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`: exact, differentiable, in O(L + S) memory.

    ``softmax(scale * query @ key.T + attn_mask) @ value`` (Vaswani et al. 2017, section 3.2.1), computed tile by tile
    with the online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 1).

    Args:
        query: (..., L, E); float64, float32, bfloat16 or float16, on the CPU or a CUDA device.
        key: (..., S, E), dtype and device as query. Leading dimensions broadcast.
        value: (..., S, Ev).
        attn_mask: at least 2-D, broadcasts to (..., L, S). bool (True takes part), or query's dtype or float32 (added
            to the scores; its gradient is summed over broadcast dimensions); or a
            `torch.nn.attention.bias.CausalBias`. With `is_causal` too both hold. A row that sees nothing gives zeros.
        dropout_p: probability, in [0, 1], of dropping a score; whatever the training mode.
        is_causal: row i sees columns 0 .. i.
        scale: default 1 / sqrt(E).
        enable_gqa: heads (dimension -3) of key and of value may be fewer, each dividing those of query.

    Returns:
        (..., L, Ev), in query's memory order.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or dropout_p outside [0, 1].
        TypeError: is_causal or enable_gqa is not a bool.
        IndexError: attn_mask has fewer than 2 dimensions, or enable_gqa with 2-D inputs.
        ValueError: a CausalBias together with is_causal, or a mask for nested tensors.
        NotImplementedError: complex or float8 inputs.

    Tensors on other devices, and nested tensors that are not jagged, go to torch's own function.
    """
    if has_torch_function((query, key, value, attn_mask)):
        if isinstance(attn_mask, CausalBias):
            causal = _causal_bias_alignment(attn_mask, query, key, is_causal)
            return _attention(query, key, value, None, dropout_p, causal, scale, enable_gqa)
        if tensor_subclasses.is_jagged(query, key, value):
            if attn_mask is not None:
                raise ValueError("attn_mask must be None for nested tensors, whose lengths say what takes part")
            query, key, value = _autocast(query), _autocast(key), _autocast(value)
            return tensor_subclasses.jagged_attention(query, key, value, dropout_p, is_causal, scale)
        if query.is_nested:
            return _call_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return cast(
            Tensor,
            handle_torch_function(
                scaled_dot_product_attention,
                (query, key, value, attn_mask),
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            ),
        )
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, but is {type(is_causal).__name__}")
    if not (query.is_cpu or query.is_cuda or query.is_meta) or query.is_nested:
        return _call_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    causal = ops.TOP_LEFT if is_causal else ops.NONE
    return _attention(query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa)


def _call_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _causal_bias_alignment(bias: CausalBias, query: Tensor, key: Tensor, is_causal: bool) -> int:
    if is_causal:
        raise ValueError("is_causal must be False when attn_mask is a CausalBias, but is True")
    if (bias.seq_len_q, bias.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        raise RuntimeError(
            f"attn_mask must be a CausalBias for (L, S) = ({query.shape[-2]}, {key.shape[-2]}), "
            f"but is for ({bias.seq_len_q}, {bias.seq_len_kv})"
        )
    return ops.TOP_LEFT if bias.variant == CausalVariant.UPPER_LEFT else ops.BOTTOM_RIGHT


def _autocast(x: Tensor) -> Tensor:
    """Casts as torch's autocast does for its own function: all but float64."""
    device = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    causal: int,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    if tensor_subclasses.is_dtensor(query, key, value):
        attend = functools.partial(_attention, dropout_p=dropout_p, causal=causal, scale=scale, enable_gqa=enable_gqa)
        return tensor_subclasses.distributed_attention(attend, query, key, value, attn_mask)
    _check_dtypes(query, key, value)
    if key.dim() > 2 and query.dim() > 2 and key.shape[-3] == 0 and query.shape[-3] > 0:
        return query[..., :0].sum(-1, keepdim=True).expand(*query.shape[:-1], value.shape[-1])  # no keys: zeros
    q, k, v, lead = _to_four_dims(query, key, value, enable_gqa)
    mask = None
    if attn_mask is not None:
        mask = _mask_to_four_dims(_autocast(attn_mask), query, (*lead, query.shape[-2], key.shape[-2]))
    out, _ = ops.attention(q, k, v, mask, softmax_scale=scale, causal=causal, dropout_p=dropout_p, heads_first=True)
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got query.dtype: "
            f"{query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    if query.dtype not in _DTYPES:
        integral = not (query.dtype.is_floating_point or query.dtype.is_complex)
        error = RuntimeError if integral else NotImplementedError
        raise error(f"query must be float64, float32, bfloat16 or float16, but is {query.dtype}")


def _to_four_dims(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """q, k and v as (batch, heads, length, columns), and the leading dimensions of the output."""
    q_shape, k_shape, v_shape = query.shape, key.shape, value.shape
    four_dims = query.dim() == key.dim() == value.dim() == 4
    if four_dims and q_shape[0] == k_shape[0] == v_shape[0] and k_shape[1] == v_shape[1] in (1, q_shape[1]):
        _check_sizes(query, key, value)
        return query, key, value, tuple(q_shape[:2])
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            "Expected query, key, and value to all be at least 2 dimensional, but got shapes "
            f"{tuple(q_shape)}, {tuple(k_shape)} and {tuple(v_shape)}"
        )
    _check_sizes(query, key, value)
    if enable_gqa:
        return _grouped_to_four_dims(query, key, value)
    try:
        lead = tuple(torch.broadcast_shapes(q_shape[:-2], k_shape[:-2], v_shape[:-2]))
    except RuntimeError:
        raise RuntimeError(
            "the leading dimensions of query, key and value must broadcast, but their shapes are "
            f"{tuple(q_shape)}, {tuple(k_shape)} and {tuple(v_shape)}"
        ) from None
    q, k, v = (_flatten_lead(x.expand(*lead, *x.shape[-2:])) for x in (query, key, value))
    return q, k, v, lead


def _check_sizes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            "query and key must have the same last dimension, but have shapes "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"key and value must have the same length, but have shapes {tuple(key.shape)} and {tuple(value.shape)}"
        )


def _flatten_lead(x: Tensor) -> Tensor:
    """(..., heads, length, columns) to four dimensions."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x if x.dim() == 4 else x.flatten(0, -4)


def _grouped_to_four_dims(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise IndexError(
            "enable_gqa needs query, key and value with heads in dimension -3, but their shapes are "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    heads, heads_k, heads_v = query.shape[-3], key.shape[-3], value.shape[-3]
    if (heads_k == 0) != (heads_v == 0) or (heads_k > 0 and (heads % heads_k != 0 or heads % heads_v != 0)):
        raise RuntimeError(
            f"with enable_gqa the heads of key and value must divide those of query, but they are {heads_k}, {heads_v} "
            f"and {heads}"
        )
    lead = tuple(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
    q, k, v = (_flatten_lead(x.expand(*lead, *x.shape[-3:])) for x in (query, key, value))
    if heads_k != heads_v:
        common = math.lcm(heads_k, heads_v)
        k, v = k.repeat_interleave(common // heads_k, 1), v.repeat_interleave(common // heads_v, 1)
    return q, k, v, (*lead, heads)


def _mask_to_four_dims(mask: Tensor, query: Tensor, scores: tuple[int, ...]) -> Tensor:
    """The mask as (batch | 1, heads | 1, L | 1, S | 1); `scores` is (..., L, S)."""
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise RuntimeError(
            f"attn_mask must be bool, float32 or query's dtype ({query.dtype}), but its dtype is {mask.dtype}"
        )
    if mask.dim() < 2:
        raise IndexError(f"attn_mask must have at least 2 dimensions, but has shape {tuple(mask.shape)}")
    shape = (1,) * (len(scores) - mask.dim()) + tuple(mask.shape)
    if len(shape) != len(scores) or any(n not in (1, m) for n, m in zip(shape, scores, strict=True)):
        raise RuntimeError(f"attn_mask must broadcast to {scores}, but has shape {tuple(mask.shape)}")
    mask = mask.reshape(shape)
    if len(shape) > 4:
        outer = len(shape) - 3
        if any(n != 1 for n in shape[:outer]):
            mask = mask.expand(*scores[:outer], *shape[outer:])
        return mask.flatten(0, outer - 1)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask


@functools.wraps(scaled_dot_product_attention)
def _replacement(
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
    # `sdpa_kernel` without FLASH_ATTENTION asks for another of torch's kernels: comparisons with them must stay true.
    function: Any = scaled_dot_product_attention if torch.backends.cuda.flash_sdp_enabled() else _torch_sdpa
    return cast(
        Tensor,
        function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa),
    )


class replace_sdpa:  # noqa: N801 - used as a function
    """Puts this package's function in place of `torch.nn.functional.scaled_dot_product_attention`.

    ``replace_sdpa()`` does so for the whole process, until `restore` is called on the result;
    ``with replace_sdpa():`` until the block ends. What was there before is put back exactly. Inside
    `torch.nn.attention.sdpa_kernel([...])` without FLASH_ATTENTION torch's own function runs. Code that imported the
    function by name beforehand, and the inference fast path of `nn.TransformerEncoderLayer`, are not reached.
    """

    def __init__(self) -> None:
        self._previous = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = _replacement  # type: ignore[assignment]

    def restore(self) -> None:
        """Puts back what was there before."""
        F.scaled_dot_product_attention = self._previous

    def __enter__(self) -> replace_sdpa:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
