"""Times builds of this package against each other on the problems of a suite: a process each, which take turns.

    python benchmarks/compare.py old=/there/site-packages new=/here/site-packages --pass bwd --head-dims 64

A build is the folder that holds its `flash_attn`; `name=folder,VARIABLE=value` sets an environment variable for it. All
processes hold the tensors of a problem at the same time. A ratio is the first build's time over this one's: above 1
this one is faster. Medians; the same build twice shows how much of a difference is noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from problem import Problem
from shapes import SUITES, Selection, problems_of

SAMPLES = 3  # of a build before it is another one's turn


class Build:
    """A process that times one build."""

    def __init__(self, text: str, device: str, passes: str, graphs: bool) -> None:
        self.name, found, rest = text.partition("=")
        folder, *settings = rest.split(",")
        if not found or not (Path(folder) / "flash_attn").is_dir() or not all("=" in setting for setting in settings):
            raise SystemExit(
                f"a build is name=folder[,VARIABLE=value ...] with a folder that holds flash_attn: {text!r}"
            )
        self.folder = Path(folder).resolve()
        environment = os.environ | dict(setting.split("=", 1) for setting in settings)
        search = [str(self.folder), str(Path(__file__).parent.resolve())]
        environment |= {"PYTHONPATH": os.pathsep.join(search), "PYTHONSAFEPATH": "1"}
        program = f"import compare; compare.serve({device!r}, {passes!r}, {graphs})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def prepare(self, problem: Problem) -> None:
        loaded = self._ask(asdict(problem))
        if not Path(loaded).resolve().is_relative_to(self.folder):
            raise SystemExit(f"{self.name} is in {self.folder}, but its Python finds {loaded}")

    def milliseconds(self) -> float:
        """Of a call of the problem."""
        return float(self._ask(None))

    def _ask(self, question: object) -> Any:
        """What `serve` says to it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(answer)


def serve(device: str, passes: str, graphs: bool) -> None:
    """In a build's process: for a problem from standard input prepares its call and says where the package is; for null
    says how many milliseconds a call takes."""
    import timing
    from backends import ours
    from bench import timed_call
    from inputs import Inputs

    import flash_attn

    timer: Callable[..., list[float]] = timing.device_times if device == "cuda" else timing.cpu_times
    if graphs:
        timer = timing.graph_times
    timed: list[timing.Timed] = []
    for line in sys.stdin:
        problem = json.loads(line)
        if problem is None:
            print(json.dumps(timer(timed, SAMPLES)[0]), flush=True)
            continue
        timed.clear()  # frees the last problem's tensors
        problem |= {name: tuple(problem[name]) for name in ("lengths", "filled")}
        timed.append(timed_call(ours(Inputs(Problem(**problem), torch.device(device))), passes))
        print(json.dumps(flash_attn.__file__), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("builds", nargs="+", metavar="name=folder")
    add("--suite", choices=SUITES, default="peers")
    add("--pass", dest="passes", choices=("fwd", "bwd", "step"), default="bwd")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    Selection.add_arguments(parser)
    add("--rounds", type=int, default=7, help=f"turns of each build, of {SAMPLES} samples (default 7)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    graphs = args.suite == "decode" and args.device == "cuda"  # as bench.py times it
    builds = [Build(text, args.device, "fwd" if graphs else args.passes, graphs) for text in args.builds]
    ratios: dict[str, list[float]] = {build.name: [] for build in builds}
    for problem in problems_of(args.suite, Selection.of_arguments(args)):
        for build in builds:
            build.prepare(problem)
        times: dict[str, list[float]] = {build.name: [] for build in builds}
        for _ in range(args.rounds):
            for build in random.sample(builds, len(builds)):
                times[build.name].append(build.milliseconds())
        medians = {name: statistics.median(values) for name, values in times.items()}
        first = medians[builds[0].name]
        for name, median in medians.items():
            ratios[name].append(first / median)
        cells = [f"{name} {median:.4f} ms x{first / median:.3f}" for name, median in medians.items()]
        print(f"{problem!s:48} " + "  ".join(cells), flush=True)
    for name, values in list(ratios.items())[1:]:
        if values:
            mean = math.exp(statistics.fmean(math.log(value) for value in values))
            print(f"{builds[0].name} / {name}: geometric mean {mean:.3f}, {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main()
