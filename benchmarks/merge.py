"""Makes one file of several runs of a suite: times of the host differ from process to process more than within one.

    for i in 1 2 3 4 5; do python benchmarks/bench.py --suite host --out /tmp/host/$i; done
    python benchmarks/merge.py /tmp/host/* --out benchmarks/results/h200

Times and ratios are medians over the runs; beside each ratio stands its least and largest, and in the header how many
runs there were.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Content = dict[str, Any]


def merged(contents: list[Content]) -> Content:
    """One file of files with the same rows."""
    first, *others = contents
    whats = [[_what(row) for row in content["rows"]] for content in contents]
    if any(what != whats[0] for what in whats):
        raise SystemExit("the runs have different rows, so that there is no median of them")
    rows = []
    for row, *same in zip(first["rows"], *(content["rows"] for content in others), strict=True):
        row = dict(row)
        for key in list(row):
            if key.endswith("_ms") or key.startswith("ratio_"):
                found = [each[key] for each in (row, *same)]
                if key.startswith("ratio_"):
                    row[key.replace("ratio_", "range_", 1)] = [min(found), max(found)]
                row[key] = round(statistics.median(found), 6)
        rows.append(row)
    return {"header": first["header"] | {"runs": len(contents)}, "rows": rows}


def _what(row: Content) -> Content:
    """A row without what was measured."""
    sizes = ("pass", "head_dim", "causal", "seqlen", "batch", "heads", "heads_k", "dtype", "mask")
    return {key: row.get(key) for key in (*sizes, "seqlen_k", "filled", "float8")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that bench.py has written to")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files made of theirs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.runs[0].glob("*.json")):
        content = merged([json.loads((run / path.name).read_text()) for run in args.runs])
        lines = ",\n  ".join(json.dumps(row) for row in content["rows"])
        head = json.dumps(content["header"], indent=1)
        (args.out / path.name).write_text(f'{{"header": {head},\n "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
