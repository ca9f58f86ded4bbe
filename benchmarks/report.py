"""What is printed and saved."""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from problem import Problem

import flash_attn

REPOSITORY = Path(__file__).resolve().parent.parent
PASS_NAMES = {"fwd": "forward", "bwd": "backward", "step": "step"}

Row = dict[str, Any]


class Peak(NamedTuple):
    """Of a matrix product: its rate, and the SM clock it ran at, which a CPU does not tell."""

    tflops: float
    mhz: float | None


def peak_shares(problem: Problem, passes: str, times: dict[str, float], peak: Peak | None, mhz: float | None) -> Row:
    """The clock while `times` were taken, and each backend's share of the matrix product's rate, per clock on a GPU."""
    if peak is None:
        return {}
    slower = mhz / peak.mhz if mhz and peak.mhz else 1.0  # tensor cores at full load lower the clock
    reachable = peak.tflops * slower
    return {"sm_mhz": mhz} | {
        f"{name}_of_peak": round(problem.flops(passes) / ms / 1e9 / reachable, 4) for name, ms in times.items()
    }


def read_shares(problem: Problem, times: dict[str, float], gbps: float) -> Row:
    """Each backend's share of the rate at which memory is read."""
    return {f"{name}_of_read": round(problem.bytes("fwd") / ms / 1e6 / gbps, 4) for name, ms in times.items()}


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """As the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        model = None
    return model.group(1) if model else platform.processor() or platform.machine()


def folder_name(device: torch.device) -> str:
    """h200 for NVIDIA H200; cpu and the model for a CPU."""
    name = re.sub(r"\((R|TM)\)|NVIDIA|CPU|Processor|@.*", " ", device_name(device))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug if device.type == "cuda" else f"cpu-{slug}"


def header(device: torch.device) -> Row:
    """Where and with what the numbers were taken; the clock is added at the end."""
    commit = _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    changes = _output(
        "git", "-C", str(REPOSITORY), "status", "--porcelain", "--", "csrc", "flash_attn", "CMakeLists.txt"
    )
    cuda = device.type == "cuda"
    return {
        "commit": commit and commit + ("+changes" if changes else ""),
        "device": device_name(device),
        "sm_clock": None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "threads": torch.get_num_threads(),
        "versions": {
            "flash_attn": flash_attn.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def make_row(
    problem: Problem, passes: str, times: dict[str, float], memory: dict[str, int], unsuited: dict[str, str], notes: Row
) -> Row:
    """One problem and one pass. ratio_x is x's time over ours: above 1 ours is faster."""
    row: Row = {
        "pass": passes,
        "head_dim": problem.head_dim,
        "causal": problem.causal,
        "seqlen": problem.seqlen,
        "seqlen_k": problem.keys,
        "batch": problem.batch,
        "heads": problem.heads,
        "heads_k": problem.kv_heads,
        "dtype": problem.dtype,
        "mask": problem.mask,
        "score": problem.score,
        "window": problem.window,
        "lengths": list(problem.lengths),
        "filled": list(problem.filled),
        "float8": problem.float8,
        "latent": problem.latent,
        **notes,
    }
    for name, ms in times.items():
        row[f"{name}_ms"] = round(ms, 6)
        if passes in PASS_NAMES:
            row[f"{name}_tflops"] = round(problem.flops(passes) / ms / 1e9, 3)
            row[f"{name}_gbps"] = round(problem.bytes(passes) / ms / 1e6, 1)
        if name in memory:
            row[f"{name}_peak_bytes"] = memory[name]
        if "ours" in times and name != "ours":
            row[f"ratio_{name}"] = round(ms / times["ours"], 4)
    row["unsuited"] = unsuited
    return row


def row_text(problem: Problem, row: Row) -> str:
    """One line for the terminal."""
    parts = [f"{row['pass']:<9} {problem!s:<44}"]
    for name in _names([row]):
        ms = row[f"{name}_ms"]
        text = f"{name} {ms:.3f} ms" if ms >= 0.1 else f"{name} {ms * 1e3:.2f} us"
        if f"{name}_tflops" in row:
            text += f" {row[f'{name}_tflops']:.3g} TFLOP/s {row[f'{name}_gbps']:.3g} GB/s"
        for share in ("peak", "read"):
            if f"{name}_of_{share}" in row:
                text += f" {row[f'{name}_of_{share}']:.0%}"
        if f"{name}_peak_bytes" in row:
            text += f" {row[f'{name}_peak_bytes'] / 2**20:.0f} MiB"
        if f"ratio_{name}" in row:
            text += f" x{row[f'ratio_{name}']:.2f}"
        parts.append(text)
    return " | ".join(parts)


def refusals(row: Row, known: set[str]) -> list[str]:
    """A line for each backend that does not run the problem, unless it has been said of it before."""
    lines = [f"          {name} does not run this: {reason}" for name, reason in row["unsuited"].items()]
    new = [line for line in lines if line not in known]
    known.update(new)
    return new


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(key[:-3] for row in rows for key in row if key.endswith("_ms")))


def summary(rows: list[Row]) -> list[str]:
    """For each pass and backend the geometric mean of the ratios and how often ours was faster."""
    lines = []
    for passes in dict.fromkeys(row["pass"] for row in rows):
        for name in _names(rows):
            ratios = [row[f"ratio_{name}"] for row in rows if row["pass"] == passes and f"ratio_{name}" in row]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                won = sum(ratio >= 1 for ratio in ratios)
                lines.append(
                    f"{passes:<9} {name:<12} / ours: geometric mean {mean:.3f}; ours ahead in {won} of {len(ratios)}"
                )
    return lines


def save(folder: Path, suite: str, head: Row, rows: list[Row]) -> list[Path]:
    """Writes a file for each pass: forward.json and backward.json for peers, sweep_forward.json for sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for passes in dict.fromkeys(row["pass"] for row in rows):
        name = f"{'' if suite in ('peers', 'host') else suite + '_'}{PASS_NAMES.get(passes, passes)}"
        path = folder / f"{'decode' if suite == 'decode' else name}.json"  # which has one pass alone
        kept = [row for row in rows if row["pass"] == passes]
        lines = ",\n  ".join(json.dumps(row) for row in kept)
        path.write_text(f'{{"header": {json.dumps(head, indent=1)},\n "rows": [\n  {lines}\n]}}\n')
        paths.append(path)
    return paths


class Progress:
    """A bar with the time left, on the terminal's last line; nothing in a file or a pipe."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()

    def draw(self) -> None:
        if self.terminal:
            spent = time.monotonic() - self.start
            left = f"{spent / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            bar = ("#" * (40 * self.done // max(1, self.total))).ljust(40)
            print(f"\r\033[K[{bar}] {self.done}/{self.total} {left}", end="", file=sys.stderr, flush=True)

    def step(self, lines: list[str]) -> None:
        """One problem is done: prints its lines above the bar."""
        self.done += 1
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        for line in lines:
            print(line, flush=True)
        if self.done < self.total:
            self.draw()
