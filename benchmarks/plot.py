"""Draws forward.json and backward.json of a results folder: TFLOP/s for each length, ours with its ratio on top.

    python benchmarks/plot.py benchmarks/results/h200

The ratio is ours over the reference: cuDNN, or torch's flash attention where there is no cuDNN.
"""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "ours": "#d62728",
    "cudnn": "#4c72b0",
    "flash": "#8c8c8c",
    "fa3": "#55a868",
    "efficient": "#c5b0d5",
    "flex": "#dd8452",
    "math": "#d9d9d9",
}
LABELS = {
    "ours": "flash_attn (this package)",
    "cudnn": "torch: cuDNN",
    "flash": "torch: flash attention",
    "efficient": "torch: memory-efficient",
    "math": "torch: math",
    "fa3": "FlashAttention 3",
    "flex": "FlexAttention",
}

Row = dict[str, Any]
Group = tuple[str, int, bool]  # dtype, head_dim, causal


MAX_COLUMNS = 8
MIN_WIDTH = 6.0  # inches; one column has to leave room for title and legend
LEGEND_ENTRY = 2.2  # inches
TITLE_LETTER = 0.11


def group_of(row: Row) -> Group:
    return row["dtype"], row["head_dim"], row["causal"]


def draw(axes: Axes, rows: list[Row]) -> None:
    """One panel: a group of bars for each length."""
    names = [name for name in COLORS if any(f"{name}_tflops" in row for row in rows)]
    reference = "cudnn" if "cudnn" in names else "flash"
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(rows))]
        heights = [row.get(f"{name}_tflops", 0.0) for row in rows]
        bars = axes.bar(places, heights, width, color=COLORS[name], label=LABELS[name])
        if name == "ours":
            ratios = [f"{row[f'ratio_{reference}']:.2f}" if f"ratio_{reference}" in row else "" for row in rows]
            axes.bar_label(bars, ratios, fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(rows)), [_length(row["seqlen"]) for row in rows])
    axes.margins(y=0.18)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _length(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def compose(folder: Path) -> Figure:
    """A panel for each file, dtype, head dimension and mask."""
    files = [path for name in ("forward", "backward") if (path := folder / f"{name}.json").exists()]
    if not files:
        raise SystemExit(f"neither forward.json nor backward.json in {folder}: run bench.py first")
    data = [json.loads(path.read_text()) for path in files]
    groups = sorted({group_of(row) for content in data for row in content["rows"]})
    columns = min(len(groups), MAX_COLUMNS)
    lines_per_file = -(-len(groups) // columns)
    lines = lines_per_file * len(files)
    width = max(2.6 * columns + 1, MIN_WIDTH)
    figure = Figure(figsize=(width, 3.0 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for n, (path, content) in enumerate(zip(files, data, strict=True)):
        own = panels[n * lines_per_file : (n + 1) * lines_per_file]
        for axes, group in itertools.zip_longest(own.flat, groups):
            if group is None:
                axes.set_axis_off()
                continue
            rows = sorted((row for row in content["rows"] if group_of(row) == group), key=lambda row: row["seqlen"])
            if rows:
                draw(axes, rows)
            dtype, head_dim, causal = group
            axes.set_title(f"{path.stem}, {dtype}, d{head_dim}, {'causal' if causal else 'full'}", fontsize=9)
        for line in own:
            line[0].set_ylabel("TFLOP/s")
    for axes in panels[-1]:
        axes.set_xlabel("sequence length")
    handles: dict[str, Artist] = {}  # one panel may show what another does not
    for axes in panels.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    entries = min(len(handles), int(width / LEGEND_ENTRY))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=entries, fontsize=9)
    head = data[0]["header"]
    title = f"{head['device']}, torch {head['versions']['torch']}; number: ours over the reference, 1 is even"
    figure.suptitle(textwrap.fill(title, int(width / TITLE_LETTER)))
    return figure


def plot(folder: Path) -> Path:
    """Draws `compose` to peers.png."""
    path = folder / "peers.png"
    compose(folder).savefig(path, dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds forward.json, backward.json; peers.png is written there")
    print(plot(parser.parse_args().folder))


if __name__ == "__main__":
    main()
