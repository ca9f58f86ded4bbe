"""Draws docs/masks.png: masks and the classes of their tiles, as the package itself draws them.

python benchmarks/mask_picture.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import pyplot

from flash_attn import PreparedMask, prepare_mask

SIZE = 2048
OUT = Path(__file__).parents[1] / "docs" / "masks.png"


def masks() -> dict[str, PreparedMask]:
    row, col = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    lengths = [700, 300, 148, 520, 380]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    prefix = (col < 600) | (col <= row)
    slopes = torch.zeros(SIZE, SIZE).masked_fill(col > row, -torch.inf)
    slopes[:, :256] += torch.randn(SIZE, 256)
    return {
        "causal documents": prepare_mask((document[:, None] == document) & (col <= row)),
        "prefix": prepare_mask(prefix),
        "window of 384 and 64 sinks": prepare_mask((col <= row) & ((row - col < 384) | (col < 64))),
        "causal, and a bias on 256 keys": prepare_mask(slopes),
    }


def main() -> None:
    torch.manual_seed(0)
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 4), layout="constrained")
    for ax, (title, mask) in zip(axes, masks().items(), strict=True):
        mask.plot(ax=ax)
        ax.set_title(title, fontsize=10)
    figure.savefig(OUT, dpi=80)
    print(OUT)


if __name__ == "__main__":
    main()
