"""A mask read once: the op that packs it, and the parts of what comes out (csrc/packed_mask.h).

A packed mask is one int64 tensor. Its parts, each from a multiple of 256 bytes on, hold cells of 16 rows x 64 columns:
which columns some row sees; what is in a cell (SEEN, HIDDEN, BIASED), a byte a cell; a bit a score, in the order of
accumulator fragments; and whether it is a band, as far as that was looked for, and whether it adds anything but 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_op.library import pack_mask_op, registrations, unchanged_mask_op

CELL_ROWS, CELL_COLS, CLASS_ROWS = 16, 64, 128
SEEN, HIDDEN, BIASED = 1, 2, 4
LEAST_WITH_BAND, KIND_WORDS = 512, 32  # rows and columns; at the end

Shape = Sequence[int]  # (batch | 1, heads | 1, rows | 1, columns | 1)


class Parts(NamedTuple):
    """Views of a packed mask."""

    seen: Tensor  # (b, h, row cells, column cells) int64: a bit a column
    classes: Tensor  # (b, h, row cells / 8, column cells) int64: a byte a row cell
    bits: Tensor  # (b, h, row cells, column cells, 32) int32, of a warp's lanes


def _up(n: int, unit: int) -> int:
    return -(-n // unit)


def _layout(shape: Shape) -> tuple[list[int], list[int], int, int, int]:
    """Shapes of cells and of words of classes; where classes and bits begin, and where all ends, in words."""
    b, h, rows, cols = shape
    cells = [b, h, _up(rows, CELL_ROWS), _up(cols, CELL_COLS)]
    words = [b, h, _up(rows, CLASS_ROWS), _up(cols, CELL_COLS)]
    classes = _up(b * h * cells[2] * cells[3], 32) * 32
    bits = classes + _up(b * h * words[2] * words[3], 32) * 32
    end = bits + _up(16 * b * h * cells[2] * cells[3], 32) * 32
    return cells, words, classes, bits, end + KIND_WORDS


def _has_band(shape: Shape) -> bool:
    b, h, rows, cols = shape
    return b == h == 1 and min(rows, cols) >= LEAST_WITH_BAND


def num_words(shape: Shape) -> int:
    """Length of a packed mask of that shape."""
    return _layout(shape)[-1]


def parts(packed: Tensor, shape: Shape) -> Parts:
    cells, words, classes, bits, _ = _layout(shape)
    count = cells[0] * cells[1] * cells[2] * cells[3]
    return Parts(
        packed[:count].view(cells),
        packed[classes : classes + words[0] * words[1] * words[2] * words[3]].view(words),
        packed[bits : bits + 16 * count].view(torch.int32).view([*cells, 32]),
    )


def band(packed: Tensor, shape: Shape) -> tuple[int, int] | None:
    """(left, right) if row r sees columns r + left to r + right and no others, as far as that was looked for. Waits for
    the device."""
    if not _has_band(shape):
        return None
    is_band, left, right = packed[-KIND_WORDS:].view(torch.int32)[:3].tolist()
    return (left, right) if is_band else None


def own(mask: Tensor) -> Tensor:
    """Where it was expanded, what it was expanded from."""
    return mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride())]


def pack(mask: Tensor) -> Tensor:
    """Packs (batch | 1, heads | 1, rows | 1, columns | 1), bool (True is seen) or floating (-inf is not)."""
    packed: Tensor = pack_mask_op(mask)
    return packed


def pack_by_rows(
    shape: Shape, device: torch.device, rows_of: Callable[[int, int], Tensor], bytes_at_once: int = 1 << 26
) -> Tensor:
    """Packs a mask that is never there as a whole.

    Args:
        shape: of the mask.
        device: of the result.
        rows_of: (first, end) to these rows of it, bool (batch | 1, heads | 1, end - first, columns | 1). `first` is a
            multiple of 128.
        bytes_at_once: about how much of it may be there.
    """
    whole = torch.empty(num_words(shape), dtype=torch.int64, device=device)
    b, h, rows, cols = shape
    step = max(1, bytes_at_once // max(1, b * h * cols * CLASS_ROWS)) * CLASS_ROWS
    first = 0
    while first < rows:
        end = rows if rows - first <= step + 1 else first + step  # a single row would count as a broadcast one
        some = rows_of(first, end)
        to, of = parts(whole, shape), parts(pack(some), some.shape)
        for x, y, unit in zip(to, of, (CELL_ROWS, CLASS_ROWS, CELL_ROWS), strict=True):
            x[:, :, first // unit : first // unit + y.shape[2]] = y
        first = end
    whole[-KIND_WORDS:] = 0  # no band, as nobody has looked, and nothing is added
    return whole


def cell_classes(packed: Tensor, shape: Shape) -> Tensor:
    """(b, h, row cells, column cells) uint8: SEEN, HIDDEN and BIASED of each cell, or-ed."""
    words = parts(packed, shape).classes
    cells = words.contiguous().view(torch.uint8).view(*words.shape, 8).transpose(3, 4).flatten(2, 3)
    return cells[:, :, : _up(shape[2], CELL_ROWS)]


def tile_classes(packed: Tensor, shape: Shape, tile: tuple[int, int]) -> Tensor:
    """The same of tiles of (rows, columns), multiples of 16 and 64: (b, h, tiles, tiles)."""
    rows, cols = tile[0] // CELL_ROWS, tile[1] // CELL_COLS
    cells = cell_classes(packed, shape)
    cells = F.pad(cells, (0, -cells.shape[3] % cols, 0, -cells.shape[2] % rows))
    tiled = cells.view(*cells.shape[:2], cells.shape[2] // rows, rows, cells.shape[3] // cols, cols)
    kinds = [(tiled & kind).amax((3, 5)) for kind in (SEEN, HIDDEN, BIASED)]
    return kinds[0] | kinds[1] | kinds[2]


def unpack(packed: Tensor, shape: Shape) -> Tensor:
    """Bool of that shape: what is seen."""
    bits = parts(packed, shape).bits
    row = torch.arange(CELL_ROWS, device=packed.device)[:, None]
    col = torch.arange(CELL_COLS, device=packed.device)
    lane, place = row % 8 * 4 + col % 8 // 2, col // 8 * 4 + row // 8 * 2 + col % 2
    seen = (bits[..., lane] >> place & 1).bool()  # (b, h, row cells, column cells, 16, 64)
    return seen.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, : shape[2], : shape[3]]


def unchanged(packed: Tensor, mask: Tensor, version: int) -> Tensor:
    """`packed`, or, where the compiler traces, a copy that is made when the graph runs.

    Raises:
        RuntimeError: `mask` was changed in place since its version counter was `version`.
    """
    if torch.compiler.is_compiling():
        copy: Tensor = unchanged_mask_op(packed, mask.detach(), version)
        return copy
    _check_version(mask, version)
    return packed


def _check_version(mask: Tensor, version: int) -> None:
    if mask._version != version:
        raise RuntimeError(
            f"attn_mask must be as it was when it was prepared, but was changed in place since: its version is "
            f"{mask._version} and was {version}. Call prepare_mask again"
        )


def _unchanged(packed: Tensor, mask: Tensor, version: int) -> Tensor:
    _check_version(mask, version)
    return packed.clone()


registrations().impl(unchanged_mask_op, _unchanged, "CompositeExplicitAutograd")


@torch.library.register_fake("flash_attn::unchanged_mask", lib=registrations())
def _unchanged_fake(packed: Tensor, mask: Tensor, version: int) -> Tensor:
    return torch.empty_like(packed)


@torch.library.register_fake("flash_attn::pack_mask", lib=registrations())
def _pack_fake(mask: Tensor) -> Tensor:
    return torch.empty(num_words(mask.shape), dtype=torch.int64, device=mask.device)
