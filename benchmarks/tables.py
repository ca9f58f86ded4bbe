"""Makes the pages that are generated: a table for each JSON file of results, and the index of experiments.

    python benchmarks/tables.py           # writes results/DEVICE/tables.md and experiments/README.md
    python benchmarks/tables.py --check   # writes nothing; names what is not current, and fails then

It needs neither torch nor this package. In every table "x" is the other implementation's time over ours: above 1 ours
is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
PASSES = {
    "fwd": "forward",
    "bwd": "backward",
    "step": "forward and backward together",
    "host_fwd": "forward",
    "host_train_fwd": "forward with a graph",
    "host_bwd": "backward",
}
LABELS = {
    "cudnn": "cuDNN",
    "flash": "torch flash",
    "efficient": "mem-efficient",
    "math": "torch math",
    "torch_varlen": "torch varlen",
    "fa3": "FlashAttention 3",
    "flex": "FlexAttention",
    "deterministic": "ours, deterministic",
    "rule": "ours, told the rule",
    "paged16": "ours, pages of 16",
    "paged64": "ours, pages of 64",
    "paged256": "ours, pages of 256",
}
SINCE_AMPERE = "sm80_"  # begins the names of files that were taken with FLASH_ATTN_FORCE=sm80
LONG = 80  # rows beyond which only a summary and the least ratios are shown
GENERATED = "<!-- Made by benchmarks/tables.py; change the source of the figures instead. -->"
INDEX = "<!-- index: made by benchmarks/tables.py -->"
TOPICS = (
    "Hopper forward, schedule",
    "Hopper forward, softmax",
    "Hopper forward, tiles and pipeline",
    "Hopper forward, masks and scores",
    "Hopper backward, order of tiles",
    "Hopper backward, rows before and dq after",
    "Hopper backward, how dQ is added up",
    "Hopper backward, grouped heads and few tiles",
    "Hopper backward, steps of a tile",
    "Hopper backward, masks and scores",
    "Hopper backward in a fixed order",
    "Kernels since Ampere",
    "Few query rows",
    "Universal CUDA kernels",
    "CPU",
    "Host",
)

Row = dict[str, Any]


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]]


def length_text(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else f"{seqlen:,}"


def case_of(row: Row) -> str:
    """What else than the plain problem a row has: its mask, or what happens to its scores."""
    score = row.get("score", "none")
    return str(score if score != "none" else row["mask"])


def problem_text(row: Row) -> str:
    """(batch, heads, seqlen, head dim) and what is special."""
    lengths = row["lengths"]
    size = f"{len(lengths)} packed of {min(lengths):,} to {max(lengths):,}" if lengths else f"{row['seqlen']:,}"
    keys, filled = row.get("seqlen_k", row["seqlen"]), row.get("filled")
    if filled:
        size += f" on {min(filled):,} to {max(filled):,} keys"
    elif not lengths and keys != row["seqlen"]:
        size += f" on {keys:,} keys"
    size += " in float8" if row.get("float8") else ""
    size += f", values {row['latent']} columns of them" if row.get("latent") else ""
    batch = "" if lengths else f"{row['batch']} x "
    heads = f"{row['heads']} heads" + (f" on {row['heads_k']}" if row["heads_k"] != row["heads"] else "")
    case = "" if case_of(row) == "none" else f", {case_of(row)}"
    window = "" if row["window"] < 0 else f", window {row['window']:,}"
    causal = "causal" if row["causal"] else "full"
    return f"d{row['head_dim']} {causal} {row['dtype']}, {batch}{size}, {heads}{case}{window}"


def names_of(rows: list[Row]) -> list[str]:
    """All implementations but ours, in the order of `LABELS`."""
    found = {key[:-3] for row in rows for key in row if key.endswith("_ms")}
    return [name for name in LABELS if name in found] + sorted(found - {"ours", *LABELS})


def summary(rows: list[Row]) -> list[str]:
    """A line for each other implementation."""
    lines = []
    for name in names_of(rows):
        timed = [row for row in rows if f"ratio_{name}" in row]
        if len(timed) < 2:
            continue
        ratios = [row[f"ratio_{name}"] for row in timed]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        ahead = sum(ratio >= 1 for ratio in ratios)
        least = min(timed, key=lambda row: row[f"ratio_{name}"])
        lines.append(
            f"- {LABELS.get(name, name)}: geometric mean {mean:.3f}, ours ahead in {ahead} of {len(ratios)}, "
            f"{min(ratios):.3f} to {max(ratios):.3f}; least at {problem_text(least)}"
        )
    return lines


def matrix(rows: list[Row], name: str) -> list[str]:
    """The ratio to one other implementation by head dim, mask and length, where the problems fill a grid."""
    cells = {(row["head_dim"], row["causal"], row["dtype"], row["seqlen"]): row for row in rows}
    lines = list(dict.fromkeys(key[:3] for key in cells))
    columns = sorted({key[3] for key in cells})
    is_grid = len(cells) == len(rows) == len(lines) * len(columns) and len(columns) > 1
    if not is_grid or not all(f"ratio_{name}" in row for row in rows):
        return []
    dtypes = {key[2] for key in lines}
    body = [
        [f"d{d} {'causal' if causal else 'full'}" + (f" {dtype}" if len(dtypes) > 1 else "")]
        + [f"{cells[d, causal, dtype, seqlen][f'ratio_{name}']:.3f}" for seqlen in columns]
        for d, causal, dtype in lines
    ]
    return [f"x {LABELS.get(name, name)}, by length:", "", *table(["", *map(length_text, columns)], body), ""]


def plain_row(row: Row, rows: list[Row]) -> Row | None:
    """For a row with grouped heads, a window or packed sequences the one without, of the same head dim and mask."""

    def is_special(other: Row) -> bool:
        return other["heads_k"] != other["heads"] or other["window"] >= 0 or bool(other["lengths"])

    same = (other for other in rows if (other["head_dim"], other["causal"]) == (row["head_dim"], row["causal"]))
    return next((other for other in same if not is_special(other)), None) if is_special(row) else None


def time_text(ms: float) -> str:
    return f"{ms:.3f} ms" if ms >= 0.1 else f"{ms * 1e3:.1f} us"


def range_text(row: Row, name: str) -> str:
    """Of the ratios of several runs, where the file is of several."""
    found = row.get(f"range_{name}")
    return f" ({found[0]:.2f} to {found[1]:.2f})" if found else ""


def full_table(rows: list[Row]) -> list[str]:
    """A line for each problem."""
    names = names_of(rows)
    has_rates = "ours_tflops" in rows[0]
    compares = any(plain_row(row, rows) for row in rows)
    head = ["problem", "ours"] + (["TFLOP/s", "of the peak"] if has_rates else [])
    head += ["of the plain rate"] * compares + [LABELS.get(name, name) for name in names]
    lines = []
    for row in rows:
        line = [problem_text(row), time_text(row["ours_ms"])]
        if has_rates:
            share = row.get("ours_of_peak")
            line += [f"{row['ours_tflops']:.3g}", "" if share is None else f"{share:.0%}"]
        if compares:
            plain = plain_row(row, rows)
            line.append("" if plain is None else f"{row['ours_tflops'] / plain['ours_tflops']:.2f}")
        for name in names:
            if f"{name}_ms" not in row:
                line.append("")
                continue
            rate = f"{row[f'{name}_tflops']:.3g}" if has_rates else time_text(row[f"{name}_ms"])
            line.append(f"{rate} x{row[f'ratio_{name}']:.3f}" + range_text(row, name))
        lines.append(line)
    return table(head, lines)


def least(rows: list[Row], count: int = 10) -> list[Row]:
    """Where ours is least ahead of the first other implementation."""
    key = f"ratio_{names_of(rows)[0]}"
    return sorted((row for row in rows if key in row), key=lambda row: row[key])[:count]


def refusals(rows: list[Row]) -> list[str]:
    """Who does not run which cases, and why."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["unsuited"].items():
            cases.setdefault((name, reason), []).append(case_of(row))
    return [
        f"- without {LABELS.get(name, name)}: {', '.join(dict.fromkeys(found))} ({reason[:200]})"
        for (name, reason), found in cases.items()
        if reason != "not installed" and name not in ("torch_varlen", "rule")
    ]


def taken(head: Row) -> str:
    """When and with what."""
    versions = head["versions"]
    parts = [f"commit {(head['commit'] or 'unknown')[:7]}", head["date"][:10], f"torch {versions['torch']}"]
    parts += [f"cuDNN {versions['cudnn']}"] * bool(versions["cudnn"])
    parts += [f"medians of {head.get('runs')} processes, of ratios the range too"] * ("runs" in head)
    parts += [f"driver {head['driver']}"] * bool(head["driver"]) + [f"{head['threads']} CPU threads"]
    if head.get("sm_clock"):
        clock = head["sm_clock"]
        parts.append(f"SM clock {clock['median_mhz']:.0f} MHz ({clock['min_mhz']:.0f} to {clock['max_mhz']:.0f})")
    peaks = [f"{peak['tflops']:.4g} TFLOP/s in {dtype}" for dtype, peak in head.get("matmul", {}).items()]
    parts += [f"torch's matrix product {', '.join(peaks)}"] * bool(peaks)
    return ", ".join(parts) + "."


def timing_section(name: str, content: Row) -> list[str]:
    """One file of times."""
    rows = content["rows"]
    of_suite = name.removeprefix(SINCE_AMPERE)
    suite = re.sub(r"_?(forward|backward|step)$", "", of_suite) or "peers"
    suite = "host" if name.startswith("host") else suite
    title = suite if of_suite == name else f"{suite} by the kernels since Ampere"
    lines = [f"## {title}: {PASSES[rows[0]['pass']]} (`{name}.json`)", "", taken(content["header"]), ""]
    lines += [*summary(rows), ""] if summary(rows) else []
    for other in dict.fromkeys([*names_of(rows)[:1], "deterministic"]):
        lines += matrix(rows, other)
    lines += [*refusals(rows), ""] if suite == "mask" else []
    if len(rows) <= LONG:
        return [*lines, *full_table(rows), ""]
    return [*lines, "The problems with the least ratios; the file has all.", "", *full_table(least(rows)), ""]


def accuracy_section(name: str, content: Row) -> list[str]:
    """The file of errors."""
    rows = [row for row in content["rows"] if row["ratio"] is not None]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    body = []
    for dtype in dtypes:
        for inputs in dict.fromkeys(row["inputs"] for row in rows):
            for causal in (False, True):
                line = [f"{dtype}, {inputs}, {'causal' if causal else 'full'}"]
                for tensor in ("out", "dq", "dk", "dv"):
                    found = [
                        row["ratio"]
                        for row in rows
                        if (row["dtype"], row["inputs"], row["causal"], row["tensor"])
                        == (dtype, inputs, causal, tensor)
                    ]
                    line.append(f"{min(found):.3f} to {max(found):.3f}" if found else "")
                body.append(line)
    ratios = [row["ratio"] for row in rows]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    head_dims = ", ".join(str(d) for d in dict.fromkeys(row["head_dim"] for row in rows))
    return [
        f"## Errors against float64 (`{name}.json`)",
        "",
        taken(content["header"]),
        "",
        "Root mean square error of ours over the least of the others'; the least and the most of head dims "
        f"{head_dims}. Over all: geometric mean {mean:.3f}, largest {max(ratios):.3f}.",
        "",
        *table(["", "out", "dq", "dk", "dv"], body),
        "",
    ]


def models_section(name: str, content: Row) -> list[str]:
    """The file of whole training steps."""
    body = []
    for row in content["rows"]:
        times = [f"{row[name]:.2f}" for name in ("torch_ms", "ours_ms")]
        alone = [f"{row[key]:.2f}" if key in row else "" for key in ("torch_kernels_ms", "ours_kernels_ms")]
        body.append([row["model"], f"{row['batch']} x {row['seqlen']:,}", *times, f"{row['ratio']:.3f}", *alone])
    head = ["model", "batch x length", "torch, ms", "ours, ms", "x", "torch's kernels alone", "ours"]
    return [f"## Training steps of models (`{name}.json`)", "", taken(content["header"]), "", *table(head, body), ""]


def decode_section(name: str, content: Row) -> list[str]:
    """The file of few query rows over caches, whose time is that of reading them."""
    rows, read = content["rows"], content["header"]["read_gbps"]
    names = names_of(rows)
    head = ["problem", "ours", "TB/s", "of what memory gives", *(LABELS.get(n, n) for n in names)]
    body = []
    for row in rows:
        line = [problem_text(row), time_text(row["ours_ms"]), f"{row['ours_gbps'] / 1e3:.2f}"]
        line.append(f"{row['ours_of_read']:.1%}")
        line += [f"{row[f'{n}_gbps'] / 1e3:.2f} x{row[f'ratio_{n}']:.3f}" if f"{n}_ms" in row else "" for n in names]
        body.append(line)
    lines = [f"## decode (`{name}.json`)", "", taken(content["header"]), ""]
    lines += [f"torch's maximum of a large tensor reads {read / 1e3:.2f} TB/s. Rates in TB/s.", ""]
    return [*lines, *summary(rows), "", *table(head, body), ""]


def order(path: Path) -> tuple[int, str]:
    """peers first, errors last."""
    name = path.stem
    rank = 0 if name in ("forward", "backward", "step") else 2 if name.startswith(SINCE_AMPERE) else 1
    return (3 if name.endswith("accuracy") else rank), name


SECTIONS = {
    "accuracy": accuracy_section,
    "fp32_accuracy": accuracy_section,
    "models": models_section,
    "decode": decode_section,
}


def results_page(folder: Path) -> str:
    """All files of one device."""
    paths = sorted(folder.glob("*.json"), key=order)
    contents = [json.loads(path.read_text()) for path in paths]
    lines = [GENERATED, "", f"# {contents[0]['header']['device']}: all tables", ""]
    lines += ["[How they are taken](../../README.md). x is the other one's time over ours: above 1 ours is faster.", ""]
    for path, content in zip(paths, contents, strict=True):
        lines += SECTIONS.get(path.stem, timing_section)(path.stem, content)
    return "\n".join(lines).rstrip() + "\n"


def experiments_page(folder: Path) -> str:
    """The introduction as it stands, and behind it an index by topic, from the first lines of each page."""
    introduction = (folder / "README.md").read_text().partition(INDEX)[0].rstrip()
    by_topic: dict[str, list[list[str]]] = {topic: [] for topic in TOPICS}
    by_number: dict[str, Path] = {}
    for path in sorted(folder.glob("[0-9][0-9][0-9]-*.md")):
        title = re.match(r"# (\d{3}) (.+)\n", text := path.read_text())
        about = re.search(r"^Topic: (.+?)\. Verdict: (.+)\.$", text, re.M)
        if title is None or about is None or about[1] not in by_topic or title[1] != path.name[:3]:
            raise SystemExit(
                f"{path}: a page begins '# NNN Title', then has a line 'Topic: A. Verdict: B.' with A of {TOPICS}"
            )
        if (first := by_number.setdefault(title[1], path)) != path:
            raise SystemExit(f"{path}: {first.name} has that number")
        by_topic[about[1]].append([f"[{title[1]}]({path.name})", title[2], about[2]])
    lines = [introduction, "", INDEX, ""]
    for topic, found in by_topic.items():
        lines += [f"## {topic}", "", *table(["page", "idea", "verdict"], found), ""] if found else []
    return "\n".join(lines).rstrip() + "\n"


def pages() -> Iterator[tuple[Path, str]]:
    """Every generated page and what it has to be."""
    for folder in sorted(path for path in (BENCHMARKS / "results").iterdir() if any(path.glob("*.json"))):
        yield folder / "tables.md", results_page(folder)
    experiments = BENCHMARKS / "experiments"
    yield experiments / "README.md", experiments_page(experiments)


def outdated() -> list[Path]:
    """Generated pages that are not what their sources make them."""
    return [path for path, text in pages() if not path.exists() or path.read_text() != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is not current")
    if parser.parse_args().check:
        if old := outdated():
            raise SystemExit("not current: " + ", ".join(str(path.relative_to(BENCHMARKS)) for path in old))
        return
    for path, text in pages():
        path.write_text(text)


if __name__ == "__main__":
    main()
