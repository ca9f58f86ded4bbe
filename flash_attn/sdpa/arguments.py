"""The arguments of `scaled_dot_product_attention` as one value, and what is asked of their types."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..masks.prepared import PreparedMask
from ..torch_op import checks


class Arguments(NamedTuple):
    """In the order of :func:`flash_attn.scaled_dot_product_attention`, which says what they mean."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | PreparedMask | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


def with_types_checked(given: Arguments) -> Arguments:
    """The same, dropout_p and scale as floats.

    Raises:
        TypeError: where torch's function does, and for a bool as a number.
    """
    for name in ("query", "key", "value"):
        checks.tensor(name, getattr(given, name))
    if given.attn_mask is not None and not isinstance(given.attn_mask, PreparedMask):
        checks.tensor("attn_mask", given.attn_mask)
    for name in ("is_causal", "enable_gqa"):
        if not isinstance(getattr(given, name), bool):
            raise TypeError(f"{name} must be a bool, but is {checks.described(getattr(given, name))}")
    dropout_p, scale = checks.number("dropout_p", given.dropout_p), checks.optional_number("scale", given.scale)
    return given._replace(dropout_p=dropout_p, scale=scale)


def any_nested(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.is_nested or key.is_nested or value.is_nested


def is_nested_call(given: Arguments) -> bool:
    """As `any_nested` where an argument may be anything, such as a proxy that stands for a tensor."""
    return any(isinstance(x, Tensor) and x.is_nested for x in given[:3])


def check_dtypes_and_devices(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got query.dtype: "
            f"{query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    checks.dtype("query", query)
    if query.device != key.device or query.device != value.device:
        raise RuntimeError(
            "Expected query, key, and value to have the same device type, but got query.device: "
            f"{query.device} key.device: {key.device} and value.device: {value.device} instead."
        )
