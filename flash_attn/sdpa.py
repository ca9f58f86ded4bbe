"""`scaled_dot_product_attention`, in place of torch's: the same inputs, the same values and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function

from . import shapes, tensor_subclasses
from .torch_op import attention as ops

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
        TypeError: an argument is of another type, such as an int for is_causal.
        IndexError: attn_mask has fewer than 2 dimensions, or enable_gqa with 2-D inputs.
        ValueError: a CausalBias together with is_causal, or a mask for nested tensors.
        NotImplementedError: complex or float8 inputs, or a DTensor sharded otherwise than over batch and heads.

    Tensors on other devices, and nested tensors that are not jagged, go to torch's own function.
    """
    if has_torch_function((query, key, value, attn_mask)):
        return overridden(
            scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    causal = ops.TOP_LEFT if is_causal else ops.NONE
    if attn_mask is None and _is_common(query, key, value, is_causal, scale, enable_gqa):
        return ops.attention(
            query, key, value, softmax_scale=scale, causal=causal, dropout_p=dropout_p, heads_first=True
        )[0]
    scale = _check_types(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if _any_nested(query, key, value):
        return _nested_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not (query.is_cpu or query.is_cuda or query.is_meta):
        return call_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _attention(query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa)


def _is_common(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
) -> bool:
    """Whether the op takes the arguments as they are. Decided in about a microsecond: the general way costs five."""
    return (
        type(query) is type(key) is type(value) is Tensor
        and type(is_causal) is bool
        and type(enable_gqa) is bool
        and (scale is None or type(scale) is float)
        and not _any_nested(query, key, value)
        and query.shape == key.shape == value.shape
        and query.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _DTYPES
        and ((query.is_cuda and key.is_cuda and value.is_cuda) or (query.is_cpu and key.is_cpu and value.is_cpu))
        and not torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu")
    )


def _any_nested(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.is_nested or key.is_nested or value.is_nested


def overridden(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """A call that torch function modes or tensor subclasses take part in; they are told that `function` was called."""
    mode = has_torch_function((None,))  # modes come first
    if not mode and (isinstance(attn_mask, CausalBias) or _any_nested(query, key, value)):
        scale = _check_types(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if _any_nested(query, key, value):
            return _nested_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if not (query.is_cpu or query.is_cuda or query.is_meta):
            return call_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        causal = _alignment(cast(CausalBias, attn_mask), query, key, is_causal)
        return _attention(query, key, value, None, dropout_p, causal, scale, enable_gqa)
    return cast(
        Tensor,
        handle_torch_function(
            function,
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


def _nested_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if not tensor_subclasses.is_jagged(query, key, value):
        return call_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if attn_mask is not None:
        raise ValueError("attn_mask must be None for nested tensors, whose lengths say what takes part")
    query, key, value = _autocast(query, key, value)
    _check_dtypes_and_devices(query, key, value)
    return tensor_subclasses.jagged_attention(query, key, value, dropout_p, is_causal, scale, enable_gqa)


def _check_types(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> float | None:
    """Raises TypeError where torch does. Returns the scale as a float."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, but is {type(x).__name__}")
    if not (attn_mask is None or isinstance(attn_mask, Tensor)):
        raise TypeError(f"attn_mask must be a Tensor or None, but is {type(attn_mask).__name__}")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, but is {type(flag).__name__}")
    if isinstance(scale, (str, bytes)):
        raise TypeError(f"scale must be a float or None, but is {type(scale).__name__}")
    return None if scale is None else float(scale)


def call_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if isinstance(attn_mask, CausalBias) and not _any_nested(query, key, value):
        # A CausalBias knows torch's function as `F.scaled_dot_product_attention` only, and there may stand ours.
        causal = _alignment(attn_mask, query, key, is_causal)
        size, offset = (attn_mask.seq_len_q, attn_mask.seq_len_kv), attn_mask.seq_len_kv - attn_mask.seq_len_q
        lower_right = torch.ones(size, dtype=torch.bool, device=query.device).tril(offset)
        attn_mask, is_causal = (None, True) if causal == ops.TOP_LEFT else (lower_right, False)
    return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _alignment(bias: CausalBias, query: Tensor, key: Tensor, is_causal: bool) -> int:
    """Top-left masks, as square ones are too, look the same whatever their size, and fit any scores."""
    if is_causal:
        raise ValueError("is_causal must be False when attn_mask is a CausalBias, but is True")
    size = (bias.seq_len_q, bias.seq_len_kv)
    if bias.variant == CausalVariant.UPPER_LEFT or size[0] == size[1]:
        return ops.TOP_LEFT
    if size != (query.shape[-2], key.shape[-2]):
        raise RuntimeError(
            f"attn_mask must be a CausalBias for (L, S) = ({query.shape[-2]}, {key.shape[-2]}), but is for {size}"
        )
    return ops.BOTTOM_RIGHT


def _autocast(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Casts as torch's autocast does for its own function: all that is floating but float64."""
    device = "cuda" if query.is_cuda else "cpu"
    if query.is_meta or not torch.is_autocast_enabled(device):
        return (query, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (query, *others))


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
    if attn_mask is None:
        query, key, value = _autocast(query, key, value)
    else:
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if type(query) is not Tensor and tensor_subclasses.is_dtensor(query, key, value):
        attend = functools.partial(_attention, dropout_p=dropout_p, causal=causal, scale=scale, enable_gqa=enable_gqa)
        return tensor_subclasses.distributed_attention(attend, query, key, value, attn_mask)
    _check_dtypes_and_devices(query, key, value)
    shapes.check_sizes(query, key, value, enable_gqa)
    lead: tuple[int, ...] | None = None  # of the output; None where they need no change
    q, k, v = query, key, value
    if not shapes.fit_as_they_are(query, key, value, enable_gqa):
        zeros = shapes.empty_result(query, key, value)
        if zeros is not None:
            return zeros
        q, k, v, lead = (shapes.group if enable_gqa else shapes.broadcast)(query, key, value)
    if attn_mask is not None:
        scores = (*(query.shape[:2] if lead is None else lead), query.shape[-2], key.shape[-2])
        attn_mask = shapes.mask_to_four_dims(attn_mask, query, scores)
    out, _ = ops.attention(
        q, k, v, attn_mask, softmax_scale=scale, causal=causal, dropout_p=dropout_p, heads_first=True
    )
    return out if lead is None else shapes.unflatten(out, lead, query)


def _check_dtypes_and_devices(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got query.dtype: "
            f"{query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    if query.dtype not in _DTYPES:
        integral = not (query.dtype.is_floating_point or query.dtype.is_complex)
        error = RuntimeError if integral else NotImplementedError
        raise error(f"query must be float64, float32, bfloat16 or float16, but is {query.dtype}")
    if query.device != key.device or query.device != value.device:
        raise RuntimeError(
            "Expected query, key, and value to have the same device type, but got query.device: "
            f"{query.device} key.device: {key.device} and value.device: {value.device} instead."
        )
