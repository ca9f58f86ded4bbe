"""`prepare_mask`: from a tensor, from lengths of documents, from FlexAttention's `BlockMask`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.func import vmap

from ..sdpa.causal_bias import is_causal_bias
from ..torch_op import checks
from . import packed_mask
from .prepared import PreparedMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SCORES_AT_ONCE = 1 << 24  # for which a mask_mod is evaluated


def prepare_mask(
    mask: Tensor | BlockMask | PreparedMask | None = None,
    *,
    lengths: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    device: torch.device | str | None = None,
) -> PreparedMask:
    """Reads a mask once, so that attention need not in every layer, forward and backward.

    The result stands in place of the mask: ``attn_mask`` of `scaled_dot_product_attention`, `flash_attn_func` and
    `FlashMHA`. It knows which tiles are hidden, which are wholly seen and which are mixed, and holds the mixed ones as
    bits: one byte for eight scores. What is broadcast stays so.

    Args:
        mask: a tensor of one to four dimensions that broadcasts to (batch, heads, L, S), bool (True takes part) or
            floating (added to the scores; -inf hides), on the CPU or a CUDA device; or FlexAttention's `BlockMask`,
            whose mask_mod is called for its partial blocks alone. None with `lengths`.
        lengths: of documents that stand one after the other: (documents) integers whose sum is L = S, or one such row
            for each batch entry, all of the same sum, filled up with zeros. Every position sees its own document;
            with ``is_causal`` what of it comes before. No dense mask is made.
        device: with `lengths` alone; default: that of the tensor, or the CPU.

    Returns:
        The mask, of the tensor's shape, of `BlockMask`'s (batch, heads, L, S), or (batch | 1, 1, L, L) for lengths.
        A floating one keeps its tensor: gradients reach it. If the tensor is changed in place afterwards, the next
        call refuses it. Nothing here waits for the device, except for lengths and a `BlockMask` on one.

    Raises:
        TypeError: the mask is something else, or lengths are no integers.
        ValueError: both or none are given; a mask of other dimensions; lengths that are negative or of different sums.
        RuntimeError: a dtype or device that attention does not take.

    Example:
        >>> mask = flash_attn.prepare_mask(keep[:, None, None, :])
        >>> for layer in layers:
        ...     x = layer(x, attn_mask=mask)
    """
    if (mask is None) == (lengths is None):
        raise ValueError(f"one of mask and lengths must be given, but {'none is' if mask is None else 'both are'}")
    if lengths is not None:
        return _of_lengths(lengths, device)
    if device is not None:
        raise ValueError(f"device is for lengths: a mask stays where it is, but device is {device!r}")
    if isinstance(mask, PreparedMask):
        return mask
    if _is_block_mask(mask):
        return _of_block_mask(mask)
    return _of_tensor(mask)


def _of_tensor(mask: Any) -> PreparedMask:
    if is_causal_bias(mask):
        raise TypeError("mask must be a plain tensor, but is a CausalBias: attention takes that as it is")
    checks.plain("mask", mask)
    if type(mask) not in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        raise TypeError(f"mask must be a plain tensor, but is {checks.described(mask)}")
    if not 1 <= mask.dim() <= 4:
        raise ValueError(f"mask must have one to four dimensions, but has shape {tuple(mask.shape)}")
    if mask.dtype != torch.bool and mask.dtype not in checks.DTYPES:
        raise RuntimeError(f"mask must be bool, float64, float32, bfloat16 or float16, but is {mask.dtype}")
    if not (mask.is_cpu or mask.is_cuda):
        raise RuntimeError(f"mask must be on the CPU or a CUDA device, but is on {mask.device}")
    values = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if not mask.requires_grad:
        values = packed_mask.own(values)
    packed = packed_mask.pack(values.detach())
    if mask.dtype == torch.bool:
        return PreparedMask(_placeholder(values.shape, mask.device), packed, mask.shape, mask)
    return PreparedMask(values, packed, mask.shape, mask)


def _placeholder(shape: Sequence[int], device: torch.device) -> Tensor:
    """A bool tensor of that shape which takes one byte: with bits given, nobody reads it."""
    return torch.ones((), dtype=torch.bool, device=device).expand(*shape)


def _of_rows(shape: torch.Size, device: torch.device, rows_of: Callable[[int, int], Tensor]) -> PreparedMask:
    return PreparedMask(
        _placeholder(shape, device), packed_mask.pack_by_rows(shape, device, rows_of), shape, source=None
    )


def _of_lengths(lengths: Any, device: torch.device | str | None) -> PreparedMask:
    given = _integers(lengths, device)
    ends = given.cumsum(1)
    total = int(ends[0, -1])
    if bool((given < 0).any()) or bool((ends[:, -1] != total).any()):
        raise ValueError(
            "lengths must not be negative, and have the same sum in every batch entry, but are "
            f"{given.tolist() if given.numel() <= 64 else f'of sums {ends[:, -1].tolist()}'}"
        )
    positions = torch.arange(total, device=given.device).expand(given.shape[0], total)
    document = torch.searchsorted(ends, positions.contiguous(), right=True)

    def rows_of(first: int, end: int) -> Tensor:
        return (document[:, first:end, None] == document[:, None, :])[:, None]

    return _of_rows(torch.Size((given.shape[0], 1, total, total)), given.device, rows_of)


def _integers(lengths: Any, device: torch.device | str | None) -> Tensor:
    """(batch, documents) int64."""
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, Iterable):
            raise TypeError(
                f"lengths must be integers, a tensor or a sequence of them, but is {checks.described(lengths)}"
            )
        rows = list(lengths)
        nested = [list(row) for row in rows] if rows and isinstance(rows[0], (list, tuple)) else [rows]
        longest = max((len(row) for row in nested), default=0)
        for row in nested:
            for n in row:
                checks.integer("lengths", n)
        lengths = torch.tensor([row + [0] * (longest - len(row)) for row in nested], dtype=torch.int64)
    elif lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, but are {lengths.dtype}")
    if lengths.dim() not in (1, 2) or lengths.numel() == 0:
        raise ValueError(f"lengths must be (documents) or (batch, documents), but have shape {tuple(lengths.shape)}")
    return lengths.to(device=device, dtype=torch.int64).reshape(-1, lengths.shape[-1])


def _is_block_mask(mask: Any) -> TypeGuard[BlockMask]:
    module = sys.modules.get("torch.nn.attention.flex_attention")  # nobody has one who has not loaded it
    return module is not None and isinstance(mask, module.BlockMask)


def _of_block_mask(mask: BlockMask) -> PreparedMask:
    device = mask.kv_indices.device
    if not (device.type == "cpu" or device.type == "cuda"):
        raise RuntimeError(f"mask must be on the CPU or a CUDA device, but is on {device}")
    shape, block = torch.Size(mask.shape), mask.BLOCK_SIZE
    partial = _listed(mask.kv_num_blocks, mask.kv_indices)
    full = None
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    rows, cols = shape[2:]

    def rows_of(first: int, end: int) -> Tensor:
        """All blocks that these rows lie in."""
        blocks = slice(first // block[0], -(-end // block[0]))
        seen = partial.new_zeros((*shape[:2], blocks.stop - blocks.start, partial.shape[3], *block))
        if full is not None:
            seen[full[:, :, blocks]] = True
        places = partial[:, :, blocks].nonzero()
        at_once = max(1, _SCORES_AT_ONCE // (block[0] * block[1]))
        for some in places.split(at_once):
            b, h, q, k = some.unbind(1)
            seen[b, h, q, k] = _evaluate(mask.mask_mod, b, h, q + blocks.start, k, block, (rows, cols))
        whole = seen.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        begin = first - blocks.start * block[0]
        return whole[:, :, begin : begin + end - first, :cols]

    return _of_rows(shape, device, rows_of)


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """(batch, heads, blocks of rows, blocks of columns) bool: whether the first `counts` of `indices` name a block."""
    named = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    columns = indices.shape[-1]
    # What is not named goes into a column of its own.
    places = torch.where(named, indices.long(), columns)
    listed = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    return listed.scatter_(-1, places, True)[..., :columns]


def _evaluate(
    mask_mod: Callable[..., Tensor],
    b: Tensor,
    h: Tensor,
    q: Tensor,
    k: Tensor,
    block: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """(blocks, *block) bool: mask_mod, called with single indices as FlexAttention does."""
    row = (q[:, None] * block[0] + torch.arange(block[0], device=q.device)).clamp(max=size[0] - 1)
    col = (k[:, None] * block[1] + torch.arange(block[1], device=k.device)).clamp(max=size[1] - 1)
    over_cols = vmap(mask_mod, in_dims=(None, None, None, 0))
    over_rows = vmap(over_cols, in_dims=(None, None, 0, None))
    seen = vmap(over_rows, in_dims=(0, 0, 0, 0))(b, h, row, col)
    return seen.expand(len(b), *block)
