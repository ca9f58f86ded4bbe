"""Padded batches to packed sequences and back, with the names and arguments of Dao's flash_attn, in torch.

Everything is differentiable. `index_first_axis`, `index_put_first_axis` and `pad_input` have shapes that follow from
their arguments and compile into one graph; what unpads has shapes that depend on the mask, which it waits for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_op import checks


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of input.

    Args:
        input: (rows, ...).
        indices: (n) int32 or int64, in [0, rows). A row that is taken twice gets the sum of both gradients.

    Returns:
        (n, ...).
    """
    _check_indices(indices)
    if checks.plain("input", input).dim() == 0:
        raise ValueError("input must have rows, but has shape ()")
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros, with `values` in rows `indices`.

    Args:
        values: (n, ...).
        indices: (n) int32 or int64, in [0, first_axis_dim), none of them twice.
        first_axis_dim: rows of the result.

    Returns:
        (first_axis_dim, ...).
    """
    return _put("values", values, indices, _size("first_axis_dim", first_axis_dim))


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `indices` of input as `index_first_axis` takes them, and input."""
    return index_first_axis(input, indices), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch without its padding, and what `flash_attn_varlen_func` has to know of them.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), any dtype; what is not zero is a token.
        unused_mask: (batch, seqlen); tokens that keep a place, and take no part if `seqused` is given to attention.

    Returns:
        The tokens (total, ...); their places in the flattened batch (total) int64; cu_seqlens (batch + 1) int32; the
        longest sequence; and tokens of `attention_mask` in each sequence, seqused (batch) int32.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    used = _token_mask("attention_mask", attention_mask, hidden_states)
    placed = used if unused_mask is None else used | _token_mask("unused_mask", unused_mask, hidden_states)
    lengths = placed.sum(-1, dtype=torch.int32)
    seqused = lengths if unused_mask is None else used.sum(-1, dtype=torch.int32)
    return *_packed(hidden_states, placed, lengths), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `unpad_input`, where each row of the batch holds several sequences, one after the other, and then padding.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) integers: the lengths of a row's sequences, in order, and zeros.

    Returns:
        The tokens (total, ...); their places in the flattened batch (total) int64; cu_seqlens (sequences + 1) int32;
        the longest sequence.

    Raises:
        ValueError: shapes that do not fit each other, or lengths that are no integers.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    if attention_mask_in_length.is_floating_point() or attention_mask_in_length.dtype == torch.bool:
        raise ValueError(f"attention_mask_in_length must be integers, but is {attention_mask_in_length.dtype}")
    filled = attention_mask_in_length.sum(-1, keepdim=True)
    placed = torch.arange(hidden_states.shape[1], device=filled.device) < filled
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    return _packed(hidden_states, placed, lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undoes `unpad_input`; padding is zeros.

    Args:
        hidden_states: (total, ...).
        indices: (total), the second result of `unpad_input`.
        batch, seqlen: of the padded batch.

    Returns:
        (batch, seqlen, ...).
    """
    batch, seqlen = _size("batch", batch), _size("seqlen", seqlen)
    return _put("hidden_states", hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _put(name: str, values: Tensor, indices: Tensor, rows: int) -> Tensor:
    _check_indices(indices)
    if checks.plain(name, values).dim() == 0 or values.shape[0] != indices.shape[0]:
        raise ValueError(
            f"{name} must have a row for each of {indices.shape[0]} indices, but has shape {tuple(values.shape)}"
        )
    return values.new_zeros((rows, *values.shape[1:])).index_put_((indices,), values)


def _size(name: str, size: int | Tensor) -> int:
    """As `checks.integer`, or a tensor's."""
    number = int(size) if isinstance(size, Tensor) and checks.is_integral(size) else checks.integer(name, size)
    if number < 0:
        raise ValueError(f"{name} must be >= 0, but is {number}")
    return number


def _packed(hidden_states: Tensor, placed: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens where `placed` (batch, seqlen) is true, their places, cu_seqlens and the longest of `lengths`."""
    indices = placed.flatten().nonzero().flatten()
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() > 0 else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, starts, longest


def _check_indices(indices: Tensor) -> None:
    if checks.plain("indices", indices).dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ValueError(f"indices must be (n) int32 or int64, but is {checks.described(indices)}")


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if checks.plain("hidden_states", hidden_states).dim() < 2 or checks.plain(name, mask).dim() != 2:
        raise ValueError(
            f"hidden_states must be (batch, seqlen, ...) and {name} (batch, seqlen), but their shapes are "
            f"{tuple(hidden_states.shape)} and {tuple(mask.shape)}"
        )
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} must be (batch, seqlen) = {tuple(hidden_states.shape[:2])}, but has shape {tuple(mask.shape)}"
        )


def _token_mask(name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    _check_mask(name, mask, hidden_states)
    return mask if mask.dtype == torch.bool else mask != 0


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`rearrange` and `repeat` of einops, which code bases import from here, where einops is installed."""
        if name in ("rearrange", "repeat"):
            return getattr(importlib.import_module("einops"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
