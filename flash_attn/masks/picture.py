"""Pictures of a prepared mask's tile classes, as text and by matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .packed_mask import BIASED, HIDDEN, SEEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .prepared import PreparedMask

_NAMES = ("skip", "full", "partial", "biased")
_LETTERS = "·█▒+"
_COLOURS = ("#eef0f3", "#2a6f97", "#f4a259", "#8f5db7")


def _kinds(mask: PreparedMask, batch: int, head: int, tile: tuple[int, int]) -> Tensor:
    """(tiles of rows, tiles of columns) on the CPU: numbers of `_NAMES`."""
    tiles = mask.tiles(tile)
    if 0 in tiles.shape[:2]:  # there are none
        return tiles.new_zeros((0, tiles.shape[3]), dtype=torch.int64, device="cpu")
    for name, index, size in (("batch", batch, tiles.shape[0]), ("head", head, tiles.shape[1])):
        if size > 1 and not 0 <= index < size:
            raise IndexError(f"{name} must be in [0, {size}), but is {index}")
    x = tiles[batch if tiles.shape[0] > 1 else 0, head if tiles.shape[1] > 1 else 0].cpu()
    kinds = ((x & HIDDEN) != 0).long() + 1
    kinds[(x & BIASED) != 0] = 3
    kinds[(x & SEEN) == 0] = 0
    return kinds


def as_text(mask: PreparedMask, batch: int, head: int, width: int) -> str:
    """See :meth:`PreparedMask.picture`."""
    if width < 1:
        raise ValueError(f"width must be at least 1, but is {width}")
    columns = -(-mask.padded_shape[3] // 128)
    side = 128 * max(1, -(-columns // width))
    kinds = _kinds(mask, batch, head, (side, side))
    shares = mask.shares()
    legend = ", ".join(
        f"{letter} {name} {share:.1%}" for letter, name, share in zip(_LETTERS, _NAMES, shares, strict=True)
    )
    rows = ["".join(_LETTERS[kind] for kind in row) for row in kinds.tolist()]
    return "\n".join([*rows, f"a letter is {side} x {side}; {legend}"])


def draw(mask: PreparedMask, batch: int, head: int, tile: tuple[int, int], ax: Axes | None) -> Axes:
    """See :meth:`PreparedMask.plot`."""
    try:
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("PreparedMask.plot needs matplotlib: pip install matplotlib") from error
    kinds = _kinds(mask, batch, head, tile)
    rows, columns = mask.padded_shape[2:]
    if ax is None:
        _, ax = pyplot.subplots()
    ax.imshow(
        kinds.numpy(),
        cmap=ListedColormap(_COLOURS),
        vmin=0,
        vmax=len(_COLOURS) - 1,
        interpolation="nearest",
        aspect="auto" if 1 in (rows, columns) else "equal",
        extent=(0, kinds.shape[1] * tile[1], kinds.shape[0] * tile[0], 0),
    )
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    shares = mask.shares(tile)
    patches = [
        Patch(facecolor=colour, edgecolor="#9aa0a6", label=f"{name} {share:.0%}")
        for name, colour, share in zip(_NAMES, _COLOURS, shares, strict=True)
        if share > 0
    ]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    return ax
