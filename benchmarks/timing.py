"""Timing by CUDA events or the host's clock, peak memory, and the GPU's clock rate while it works."""

from __future__ import annotations

import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

Entered = Callable[[], AbstractContextManager[object]]
Timed = tuple[Entered, Callable[[], object]]  # what to enter around a call, and the call

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
DELAY_CYCLES = 700_000  # about 0.4 ms: longer than the host mostly needs to enqueue a forward or backward pass
LONGEST_DELAY = 8 * DELAY_CYCLES
SHORTEST_SAMPLE = 2e-3  # seconds; on the CPU shorter calls are repeated within a sample
DISTURBED = 1.4  # a median over so many times the least
GRAPH_MS = 5.0  # a graph's
HOST_CALLS = 500  # calls a sample of host time; fewer launches than a CUDA stream queues


def _medians(count: int, rounds: int, sample: Callable[[Sequence[int]], Sequence[float]]) -> list[float]:
    """Median of what `sample` measures of each of `count` calls, in a new random order each round.

    So heat, clocks and neighbours fall on all alike. If most samples of a call were disturbed, which shows in a median
    far above the least, as many rounds are added, at most three times.
    """
    samples: list[list[float]] = [[] for _ in range(count)]
    for _ in range(4):
        for _ in range(rounds):
            order = random.sample(range(count), count)
            for i, value in zip(order, sample(order), strict=True):
                samples[i].append(value)
        if all(statistics.median(values) <= DISTURBED * min(values) for values in samples):
            break
    return [statistics.median(values) for values in samples]


def device_times(timed: Sequence[Timed], rounds: int) -> list[float]:
    """Median milliseconds on the GPU of each call, after one round to warm up.

    Each call comes behind a write to `FLUSH_BYTES`, so that its inputs are not in L2, and a delay on the device, so
    that all its kernels are enqueued before the first one starts. If the delay has passed before they are, the device
    has waited for the host: such a sample is taken again, and this call has twice the delay from then on. A call that
    is late behind the longest delay too waits for the device itself, and counts.
    """
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    delays = [DELAY_CYCLES] * len(timed)

    def enqueue(i: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        enter, call = timed[i]
        with enter():
            while True:
                flush.zero_()
                torch.cuda._sleep(delays[i])
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                if not start.query() or delays[i] >= LONGEST_DELAY:
                    return start, end
                delays[i] *= 2

    def sample(order: Sequence[int]) -> list[float]:
        events = [enqueue(i) for i in order]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    sample(range(len(timed)))
    return _medians(len(timed), rounds, sample)


def kernels_ms(call: Callable[[], object], repeats: int = 3) -> float:
    """Milliseconds of a call's kernels alone, added up, by torch's profiler."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.self_device_time_total for event in on_device) / repeats / 1e3


def cpu_times(timed: Sequence[Timed], rounds: int) -> list[float]:
    """Median milliseconds of each call by the host's clock, after one round to warm up."""
    repeats = []
    for enter, call in timed:
        with enter():
            call()
            start = time.perf_counter()
            call()
            repeats.append(max(1, round(SHORTEST_SAMPLE / (time.perf_counter() - start))))
    return _host_medians(timed, rounds, repeats)


def host_times(timed: Sequence[Timed], rounds: int) -> list[float]:
    """Median milliseconds that a call holds the host up, results not waited for."""
    return _host_medians(timed, rounds + 1, [HOST_CALLS] * len(timed))


def _host_medians(timed: Sequence[Timed], rounds: int, repeats: Sequence[int]) -> list[float]:
    cuda = torch.cuda.is_available()

    def one(i: int) -> float:
        enter, call = timed[i]
        with enter():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats[i]):
                call()
            return (time.perf_counter() - start) / repeats[i] * 1e3

    return _medians(len(timed), rounds, lambda order: [one(i) for i in order])


def peak_bytes(timed: Timed) -> int:
    """Most device memory in use during a call, above what was in use before it."""
    enter, call = timed
    with enter():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
    return peak


class ClockLog:
    """Reads SM clock, power and temperature four times a second while the block runs, by nvidia-smi."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the log
        self.process: subprocess.Popen[str] | None = None
        self.marked = 0

    def __enter__(self) -> ClockLog:
        if self.enabled:
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            query = [
                "--query-gpu=clocks.sm,power.draw,temperature.gpu,utilization.gpu",
                "--format=csv,noheader,nounits",
            ]
            try:
                self.process = subprocess.Popen(
                    ["nvidia-smi", f"--id=GPU-{uuid}", *query, "--loop-ms=250"],
                    stdout=self.file,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            except OSError:
                self.process = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def mark(self) -> None:
        """What :meth:`mhz` tells about begins here."""
        self.marked = len(self._samples())

    def mhz(self) -> float | None:
        """Median clock since the mark, of the samples in which the GPU was busy; None without any."""
        busy = [row[0] for row in self._samples()[self.marked :] if row[3] > 0]
        return statistics.median(busy) if busy else None

    def summary(self) -> dict[str, float] | None:
        """Median and extremes of the samples in which the GPU was busy; None without any."""
        busy = [row for row in self._samples() if row[3] > 0]
        if not busy:
            return None
        clocks = [row[0] for row in busy]
        return {
            "median_mhz": statistics.median(clocks),
            "min_mhz": min(clocks),
            "max_mhz": max(clocks),
            "median_watts": statistics.median(row[1] for row in busy),
            "max_celsius": max(row[2] for row in busy),
        }

    def _samples(self) -> list[list[float]]:
        self.file.seek(0)
        rows = []
        for line in self.file.read().splitlines():
            try:
                rows.append([float(value) for value in line.split(",")])
            except ValueError:
                continue  # a line cut off by the end, or a quantity that this GPU does not report
        return [row for row in rows if len(row) == 4]


def graph_times(timed: Sequence[Timed], rounds: int) -> list[float]:
    """Median milliseconds of each call in a CUDA graph of as many of it as take a few milliseconds, one behind the
    other: what a call costs where programs replay graphs. What fits into L2 is there."""
    graphs: list[tuple[torch.cuda.CUDAGraph, int]] = []
    stream = torch.cuda.Stream()
    for (enter, call), ms in zip(timed, device_times(timed, 1), strict=True):
        count = max(1, min(100, int(GRAPH_MS / ms)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), enter():
            call()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(count):
                    call()
        graphs.append((graph, count))

    def one(i: int) -> float:
        graph, count = graphs[i]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    for i in range(len(timed)):
        one(i)
    return _medians(len(timed), rounds, lambda order: [one(i) for i in order])


def read_gbps(device: torch.device) -> float:
    """How fast torch's maximum of a large tensor reads memory: the practical limit of the device."""
    size = 1 << (32 if device.type == "cuda" else 28)
    x = torch.ones(size // 8, dtype=torch.int64, device=device)
    timer = device_times if device.type == "cuda" else cpu_times
    (ms,) = timer([(nullcontext, lambda: x.max())], 9)
    return size / ms / 1e6


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What torch's matrix product of two large squares reaches: the practical peak of the device."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = device_times if device.type == "cuda" else cpu_times
    (ms,) = timer([(nullcontext, lambda: a @ b)], 9)
    return 2 * size**3 / ms / 1e9
