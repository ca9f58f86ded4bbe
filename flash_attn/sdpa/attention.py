"""`scaled_dot_product_attention`, in place of torch's: the same inputs, the same values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from .. import tensor_subclasses
from ..autocast import autocast
from ..masks.prepared import PreparedMask, to_op
from ..torch_op import attention as ops
from ..torch_op import checks, plain
from ..torch_op.arguments import plain_options
from ..torch_op.private import is_traced, torch_sdpa
from . import context_parallel, shapes
from .arguments import Arguments, any_nested, check_dtypes_and_devices, is_nested_call, with_types_checked
from .causal_bias import is_causal_bias, is_top_left, to_mask

_PLAIN = [plain_options(causal, True, False) for causal in (ops.NONE, ops.TOP_LEFT, ops.BOTTOM_RIGHT)]

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | PreparedMask | None = None,
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
        attn_mask: at least 1-D, broadcasts to (..., L, S). bool (True takes part), or query's dtype or float32 (added
            to the scores; its gradient is summed over broadcast dimensions); or what :func:`flash_attn.prepare_mask`
            made of one; or a `torch.nn.attention.bias.CausalBias`. With `is_causal` too both hold. A row that sees
            nothing gives zeros.
        dropout_p: probability, in [0, 1], of dropping a score; whatever the training mode.
        is_causal: row i sees columns 0 .. i.
        scale: default 1 / sqrt(E).
        enable_gqa: heads (dimension -3) of key and of value may be fewer, each dividing those of query.

    Returns:
        (..., L, Ev), in query's memory order.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or dropout_p outside [0, 1].
        TypeError: an argument is of another type, such as an int for is_causal, or a scale that requires grad.
        IndexError: attn_mask has no dimensions, or enable_gqa with 2-D inputs.
        ValueError: a CausalBias together with is_causal, or a mask for nested tensors.
        NotImplementedError: complex or float8 inputs, a DTensor sharded otherwise than over batch and heads or with a
            prepared mask, or torch's `context_parallel` is active.

    Tensors on other devices, and nested tensors that are not jagged, go to torch's own function.
    """
    if F.scaled_dot_product_attention is not torch_sdpa:
        context_parallel.refuse("scaled_dot_product_attention")
    if not is_traced():
        out = plain.try_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    given = Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if has_torch_function_variadic(query, key, value, attn_mask):
        return overridden(scaled_dot_product_attention, given)
    return attend(given)


def attend(given: Arguments) -> Tensor:
    """The same, once `plain.try_sdpa` has not served, nobody overrides torch functions, and torch's `context_parallel`
    is known not to be active."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = given
    if (
        attn_mask is None
        and type(query) is type(key) is type(value) is Tensor
        and type(is_causal) is type(enable_gqa) is bool
        and (scale is None or type(scale) is float)
        and (type(dropout_p) is float or type(dropout_p) is int)
        and dropout_p != 0
        and _is_common(query, key, value)
    ):
        causal = ops.TOP_LEFT if is_causal else ops.NONE
        out, _ = ops.attention(
            query, key, value, softmax_scale=scale, causal=causal, dropout_p=dropout_p, heads_first=True
        )
        return out
    return _attend(given)


def _is_common(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the op takes the tensors as they are. Decided in about a microsecond: the general way costs five."""
    return (
        not (query.is_nested or key.is_nested or value.is_nested)
        and not torch.compiler.is_compiling()  # there, a length known only at run time can't be compared
        and query.shape == key.shape == value.shape
        and query.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.dtype in checks.DTYPES
        and ((query.is_cuda and key.is_cuda and value.is_cuda) or (query.is_cpu and key.is_cpu and value.is_cpu))
        and not torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu")
    )


def overridden(function: Callable[..., Tensor], given: Arguments) -> Tensor:
    """A call that torch function modes or tensor subclasses take part in; they are told that `function` was called."""
    mode = has_torch_function((None,))  # modes come first
    if not mode and (is_causal_bias(given.attn_mask) or is_nested_call(given)):
        return _attend(given)
    inputs, options = given[:3], given._asdict()
    for name in ("query", "key", "value"):
        del options[name]
    return cast(Tensor, handle_torch_function(function, given[:4], *inputs, **options))


def call_torch(given: Arguments) -> Tensor:
    """Torch's own function."""
    bias = given.attn_mask
    if is_causal_bias(bias) and not any_nested(*given[:3]):
        # A CausalBias knows torch's function as `F.scaled_dot_product_attention` only, and there may stand ours.
        if _alignment(bias, given) == ops.TOP_LEFT:
            given = given._replace(attn_mask=None, is_causal=True)
        else:
            given = given._replace(attn_mask=to_mask(bias, given.query.device))
    if isinstance(given.attn_mask, PreparedMask):
        given = given._replace(attn_mask=given.attn_mask.to_dense())
    return torch_sdpa(*given[:6], scale=given.scale, enable_gqa=given.enable_gqa)


def _attend(given: Arguments) -> Tensor:
    given = with_types_checked(given)
    query, key, value, attn_mask = given[:4]
    try:
        if any_nested(query, key, value):
            return _nested_attention(given)
        if not (query.is_cpu or query.is_cuda or query.is_meta):
            return call_torch(given)
        if is_causal_bias(attn_mask):
            return _attention(given._replace(attn_mask=None), _alignment(attn_mask, given))
        return _attention(given, ops.TOP_LEFT if given.is_causal else ops.NONE)
    except RuntimeError as error:
        checks.rename(error, {"q": "query", "k": "key", "v": "value", "softmax_scale": "scale"})
        raise


def _nested_attention(given: Arguments) -> Tensor:
    if not tensor_subclasses.is_jagged(*given[:3]):
        return call_torch(given)
    if given.attn_mask is not None:
        raise ValueError("attn_mask must be None for nested tensors, whose lengths say what takes part")
    given = _cast(given)
    check_dtypes_and_devices(*given[:3])
    return tensor_subclasses.jagged_attention(given)


def _alignment(bias: CausalBias, given: Arguments) -> int:
    """Top-left masks, as square ones are too, look the same whatever their size, and fit any scores."""
    if given.is_causal:
        raise ValueError("is_causal must be False when attn_mask is a CausalBias, but is True")
    if is_top_left(bias):
        return ops.TOP_LEFT
    size, scores = (bias.seq_len_q, bias.seq_len_kv), (given.query.shape[-2], given.key.shape[-2])
    if size != scores:
        raise RuntimeError(f"attn_mask must be a CausalBias for (L, S) = {scores}, but is for {size}")
    return ops.BOTTOM_RIGHT


def _cast(given: Arguments) -> Arguments:
    if given.attn_mask is None or isinstance(given.attn_mask, PreparedMask):
        query, key, value = autocast(*given[:3])
        return given._replace(query=query, key=key, value=value)
    query, key, value, attn_mask = autocast(*given[:3], given.attn_mask)
    return given._replace(query=query, key=key, value=value, attn_mask=attn_mask)


def _attention(given: Arguments, causal: int) -> Tensor:
    given = _cast(given)
    query, key, value, attn_mask = given[:4]
    if type(query) is not Tensor and tensor_subclasses.is_dtensor(query, key, value):
        if isinstance(attn_mask, PreparedMask):
            raise NotImplementedError("attn_mask must be a tensor with DTensors, but is a PreparedMask")

        def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
            return _attention(given._replace(query=query, key=key, value=value, attn_mask=attn_mask), causal)

        return tensor_subclasses.distributed_attention(attend, query, key, value, attn_mask)
    check_dtypes_and_devices(query, key, value)
    shapes.check_sizes(query, key, value, given.enable_gqa)
    lead: tuple[int, ...] | None = None  # of the output; None where they need no change
    q, k, v = query, key, value
    if not shapes.fit_as_they_are(query, key, value, given.enable_gqa):
        zeros = shapes.empty_result(query, key, value)
        if zeros is not None:
            return zeros
        q, k, v, lead = (shapes.group if given.enable_gqa else shapes.broadcast)(query, key, value)
    mask = packed = None
    if attn_mask is not None:
        scores = (*(query.shape[:2] if lead is None else lead), query.shape[-2], key.shape[-2])
        mask, packed = to_op(attn_mask, query, scores)
    out: Tensor | None = None
    if (
        packed is None
        and not is_traced()
        and type(q) is type(k) is type(v) is Tensor
        and (mask is None or type(mask) is Tensor)
        and not has_torch_function_variadic(q)
    ):
        out = plain.try_attend(q, k, v, mask, given.scale, _PLAIN[causal], given.dropout_p)
    if out is None:
        out, _ = ops.attention(
            q,
            k,
            v,
            mask,
            packed_mask=packed,
            softmax_scale=given.scale,
            causal=causal,
            dropout_p=given.dropout_p,
            heads_first=True,
        )
    return out if lead is None else shapes.unflatten(out, lead, query)
