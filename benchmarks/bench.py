"""Times this package's attention against every other implementation that is installed, all in one process.

Calls of all backends are interleaved in random order, and the median of --rounds is taken. On CUDA each call comes
behind a flush of the L2 cache and a delay on the device that hides the host's time. Before anything is timed, results
are compared, and the run stops if they differ. A ratio is the other one's time over ours: above 1 ours is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import report
import timing
import torch
from agreement import PAGED, check
from backends import BACKENDS, Contender, contenders
from inputs import DTYPES, Inputs
from problem import Problem
from shapes import SUITES, Selection, problems_of

import flash_attn

PASSES = {
    "fwd": ("fwd",),
    "bwd": ("bwd",),
    "both": ("fwd", "bwd"),
    "step": ("step",),
    "all": ("fwd", "bwd", "step"),
}
HOST_PASSES = ("host_fwd", "host_train_fwd", "host_bwd")


def timed_call(contender: Contender, passes: str) -> timing.Timed:
    """The call to time: forward without gradients; backward alone of a graph that is kept; or both in one, a step."""

    def gradients(out: torch.Tensor, retain_graph: bool) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, contender.leaves, contender.dout, retain_graph=retain_graph)

    passes = passes.removeprefix("host_")
    enter = partial(contender.entered, grad=passes != "fwd")
    if passes in ("fwd", "train_fwd"):
        return enter, contender.forward
    if passes == "step":
        return enter, lambda: gradients(contender.forward(), False)
    with enter():
        out = contender.forward()
    return enter, lambda: gradients(out, True)


def kernel_of(able: list[Contender], train: bool) -> dict[str, str]:
    """Which of our kernels runs."""
    mine = next((contender for contender in able if contender.name == "ours"), None)
    if mine is None:
        return {}
    with mine.entered(grad=train):
        call = flash_attn.explain(mine.forward).calls[0]
    choice = call.backward if train and call.backward is not None else call.forward
    return {"ours_kernel": f"{choice.family}: {choice.kernel}"}


def products_in_float32(device: torch.device) -> set[str]:
    """Dtypes that kernels multiply in float32 there. Torch's own product of such matrices runs at a thousandth of the
    rate."""
    if device.type != "cpu":
        return set()
    has_bf16 = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return {"fp16"} if has_bf16 else {"fp16", "bf16"}


class Peaks:
    """What torch's matrix products reach in each dtype, and at which clock, and how fast memory is read; measured when
    first asked for."""

    def __init__(self, device: torch.device, clock: timing.ClockLog) -> None:
        self.device, self.clock = device, clock
        self.found: dict[str, report.Peak] = {}
        self.read: float | None = None

    def of(self, dtype: str) -> report.Peak:
        if dtype in products_in_float32(self.device):
            dtype = "fp32"
        if dtype not in self.found:
            self.clock.mark()
            tflops = timing.matmul_tflops(self.device, DTYPES[dtype])
            self.found[dtype] = report.Peak(tflops, self.clock.mhz())
        return self.found[dtype]

    def read_gbps(self) -> float:
        if self.read is None:
            self.read = timing.read_gbps(self.device)
        return self.read


def measure(problem: Problem, args: argparse.Namespace, peaks: Peaks, clock: timing.ClockLog) -> list[report.Row]:
    """All passes of one problem."""
    device = torch.device(args.device)
    inputs = Inputs(problem, device)
    wanted = HOST_PASSES if args.suite == "host" else PASSES[args.passes]
    if args.suite == "decode":
        wanted = ("fwd",)
    train = any(passes not in ("fwd", "host_fwd") for passes in wanted)
    able, unsuited = contenders(args.backends, inputs, train)
    agreement = check(able, inputs, train)
    timer: Callable[..., list[float]] = timing.device_times if device.type == "cuda" else timing.cpu_times
    if args.suite == "host":
        timer = timing.host_times
    if args.suite == "decode" and device.type == "cuda":
        timer = timing.graph_times
    rows = []
    for passes in wanted:
        calls = [timed_call(contender, passes) for contender in able]
        peak = None if args.suite in ("host", "decode") else peaks.of(problem.dtype)
        clock.mark()
        times = dict(zip((contender.name for contender in able), timer(calls, args.rounds), strict=True))
        shares = report.peak_shares(problem, passes, times, peak, clock.mhz())
        if args.suite == "decode":
            shares = report.read_shares(problem, times, peaks.read_gbps())
        memory = {}
        if device.type == "cuda":
            # Backward's own peak would leave out what forward keeps for it: both together are measured.
            whole = "fwd" if passes in ("fwd", "host_fwd") else "step"
            memory = {contender.name: timing.peak_bytes(timed_call(contender, whole)) for contender in able}
        notes = {"agreement": agreement, **shares, **kernel_of(able, passes in ("bwd", "step", "host_bwd"))}
        rows.append(report.make_row(problem, passes, times, memory, unsuited, notes))
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=SUITES, default="peers", help="problems; host is the host's time for each call")
    add("--pass", dest="passes", choices=PASSES, default="both", help="both is fwd and bwd; step is the two as one")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    Selection.add_arguments(parser)
    add("--only-backend", choices=BACKENDS, nargs="+", metavar="NAME", help=f"of {', '.join(BACKENDS)}")
    add("--flex", action="store_true", help="FlexAttention too, which compiles for every problem")
    add("--rounds", type=int, default=9, help="samples of each call; their median counts (default 9)")
    add("--threads", type=int, help="torch.set_num_threads")
    add("--out", type=Path, help="folder for the JSON files; default results/DEVICE for a whole suite, else not saved")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    # torch's math path takes longer on a GPU than all others together, and only runs short sequences there.
    left_out = {
        "flex": not args.flex,
        "math": args.device == "cuda" and args.suite in ("peers", "sweep", "decode"),
        "deterministic": args.suite != "deterministic",
        "rule": args.suite != "mask",
        **{name: args.suite != "decode" for name in PAGED},
        "efficient": args.suite == "decode",  # it takes no grouped heads
    }
    if args.suite == "deterministic":
        left_out |= {name: True for name in BACKENDS if name not in ("ours", "cudnn", "deterministic")}
    args.backends = args.only_backend or [name for name in BACKENDS if not left_out.get(name, False)]
    whole = Selection.of_arguments(args).is_whole and not args.only_backend
    if args.out is None and whole:
        args.out = Path(__file__).parent / "results" / report.folder_name(torch.device(args.device))
    return args


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    problems = problems_of(args.suite, Selection.of_arguments(args))
    head = report.header(torch.device(args.device))
    print(f"{head['device']}, {head['threads']} threads, {head['versions']}, commit {head['commit']}", flush=True)
    progress = report.Progress(len(problems))
    progress.draw()
    rows: list[report.Row] = []
    refused: set[str] = set()
    with timing.ClockLog(enabled=args.device == "cuda") as clock:
        peaks = Peaks(torch.device(args.device), clock)
        for problem in problems:
            new = measure(problem, args, peaks, clock)
            rows += new
            lines = [report.row_text(problem, row) for row in new]
            progress.step([*lines, f"          agreement: {new[0]['agreement']}", *report.refusals(new[0], refused)])
            if args.out is not None:
                head["sm_clock"] = clock.summary()
                head["matmul"] = {dtype: peak._asdict() for dtype, peak in peaks.found.items()}
                head["read_gbps"] = peaks.read
                report.save(args.out, args.suite, head, rows)
    print(*report.summary(rows), sep="\n")
    print(f"SM clock: {clock.summary()}" if args.device == "cuda" else "", end="\n" if args.device == "cuda" else "")
    if args.out is not None:
        print("saved:", *report.save(args.out, args.suite, head, rows))


if __name__ == "__main__":
    main()
