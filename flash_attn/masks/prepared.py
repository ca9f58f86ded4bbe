"""`PreparedMask`: a mask that was read once, for all layers and both passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..sdpa.shapes import check_mask_shape, mask_to_four_dims
from . import packed_mask
from . import picture as mask_picture
from .packed_mask import BIASED, HIDDEN, SEEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TILE = (128, 128)  # query rows, keys: what kernels mostly work in


class TileShares(NamedTuple):
    """Shares of a mask's scores that lie in tiles of each class. They sum to 1."""

    skip: float  # nothing is seen: the tile is not visited
    full: float  # all is seen, and nothing is added: as without a mask
    partial: float  # some is hidden: bits are read
    biased: float  # something other than 0 and -inf is added: values are read


class PreparedMask:
    """What :func:`flash_attn.prepare_mask` returns. Functions of this package take it as ``attn_mask``.

    Attributes:
        shape: as it was given.
        dtype: bool, or that of the values.
        device: as it was given.

    A floating mask keeps its tensor, whose values are read where they are neither 0 nor -inf and which gets the
    gradient. Of a boolean one only bits are used; the tensor is kept so that its changes are noticed.
    """

    def __init__(self, values: Tensor, packed: Tensor, shape: torch.Size, source: Tensor | None) -> None:
        """
        Args:
            values: (batch | 1, heads | 1, rows | 1, columns | 1); if bool, only its shape counts.
            packed: of these values, see `packed_mask`.
            shape: before it was brought to four dimensions.
            source: whose changes matter.
        """
        self.shape, self.dtype, self.device = shape, values.dtype, values.device
        self._values, self._packed, self._source = values, packed, source
        self._version = _version(source)

    @property
    def padded_shape(self) -> torch.Size:
        """(batch | 1, heads | 1, query rows | 1, keys | 1)"""
        return self._values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the bits and classes; the values of a floating mask are not counted."""
        return self._packed.numel() * self._packed.element_size()

    @property
    def visited(self) -> float:
        """Share of the scores that lie in tiles of 128 x 128 with something seen. Waits for the device."""
        return 1.0 - self.shares().skip

    def shares(self, tile: tuple[int, int] = TILE) -> TileShares:
        """Shares of the tiles' classes. Waits for the device.

        Args:
            tile: (query rows, keys), multiples of 16 and 64.

        Raises:
            ValueError: another tile.
        """
        return shares_of(self._packed, self._values.shape, tile)

    def tiles(self, tile: tuple[int, int] = TILE) -> Tensor:
        """What is in each tile, or-ed: 1 something seen, 2 something hidden, 4 something added.

        Returns:
            (batch | 1, heads | 1, tiles of rows | 1, tiles of columns | 1) uint8. `tile` is as in `shares`.
        """
        _check_tile(tile)
        return packed_mask.tile_classes(self._packed, self._values.shape, tile)

    def to_dense(self) -> Tensor:
        """A tensor of `shape` and `dtype` that means the same."""
        values = self._values if self.dtype != torch.bool else packed_mask.unpack(self._packed, self._values.shape)
        return values.expand((1,) * (4 - len(self.shape)) + self.shape).reshape(self.shape)

    def picture(self, batch: int = 0, head: int = 0, width: int = 64) -> str:
        """Its tiles as text, one letter each, those of one batch entry and head: ``█`` full, ``▒`` partial, ``+``
        biased, ``·`` skipped. Tiles are 128 x 128, or multiples of that where more than `width` would stand in a row.
        """
        return mask_picture.as_text(self, batch, head, width)

    def plot(self, batch: int = 0, head: int = 0, *, tile: tuple[int, int] = TILE, ax: Axes | None = None) -> Axes:
        """Draws its tiles with matplotlib, into `ax` or a new figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return mask_picture.draw(self, batch, head, tile, ax)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"PreparedMask({tuple(self.shape)}, {dtype}, {self.device}, {self.nbytes} bytes)"

    def __str__(self) -> str:
        return f"{self!r}\n{self.picture()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedMask:
        return self  # nothing of it changes

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_source"] = None if self.dtype == torch.bool else self._values
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._version = _version(self._source)

    def for_scores(self, query: Tensor, scores: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What the op takes: attn_mask and packed_mask.

        Args:
            query: whose device and dtype it has to fit.
            scores: (batch, heads, L, S).

        Raises:
            RuntimeError: it does not fit, or was changed since.
        """
        if self.dtype not in (torch.bool, query.dtype, torch.float32):
            raise RuntimeError(
                f"attn_mask must be bool, float32 or query's dtype ({query.dtype}), but was prepared from {self.dtype}"
            )
        if self.device != query.device:
            raise RuntimeError(
                f"attn_mask must be on query's device ({query.device}), but was prepared on {self.device}"
            )
        if len(scores) != 4 and len(self.shape) > 2:
            raise RuntimeError(
                f"a prepared attn_mask of shape {tuple(self.shape)} is for inputs of four dimensions, but the scores "
                f"are {scores}"
            )
        check_mask_shape(self.shape, scores)
        packed = self._packed
        if self._source is not None and self._version is not None:
            packed = packed_mask.unchanged(packed, self._source, self._version)
        return self._values, packed


def to_op(mask: Tensor | PreparedMask, query: Tensor, scores: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """What the op takes: attn_mask and packed_mask. `scores` is (..., L, S)."""
    if isinstance(mask, PreparedMask):
        return mask.for_scores(query, scores)
    return mask_to_four_dims(mask, query, scores), None


def _version(source: Tensor | None) -> int | None:
    """None where nothing counts versions: inference tensors, and what is made in a compiled function."""
    if source is None or torch.compiler.is_compiling() or source.is_inference():
        return None
    return source._version


def _check_tile(tile: tuple[int, int]) -> None:
    rows, cols = tile
    if rows < 1 or cols < 1 or rows % packed_mask.CELL_ROWS or cols % packed_mask.CELL_COLS:
        raise ValueError(f"tile must be (a multiple of 16, a multiple of 64), but is {tile}")


def shares_of(packed: Tensor, shape: torch.Size, tile: tuple[int, int] = TILE) -> TileShares:
    """Of a packed mask of (batch | 1, heads | 1, rows | 1, columns | 1)."""
    _check_tile(tile)
    tiles = packed_mask.tile_classes(packed, shape, tile)
    if tiles.numel() == 0:
        return TileShares(1.0, 0.0, 0.0, 0.0)
    heights, widths = (
        torch.full((count,), size).index_fill(0, torch.tensor(count - 1), n - (count - 1) * size).double()
        for count, size, n in zip(tiles.shape[2:], tile, shape[2:], strict=True)
    )
    area = heights[:, None] * widths / (shape[0] * shape[1] * heights.sum() * widths.sum())
    tiles = tiles.cpu()
    seen, hidden, biased = ((tiles & kind) != 0 for kind in (SEEN, HIDDEN, BIASED))
    kinds = (~seen, seen & ~hidden & ~biased, seen & hidden & ~biased, seen & biased)
    return TileShares(*(float((area * kind).sum()) for kind in kinds))
