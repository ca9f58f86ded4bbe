"""How the benchmarks take a sample on the GPU; events and the device's delay are replaced."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks/timing.py"
    spec = importlib.util.spec_from_file_location("benchmarks_timing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FLUSH_BYTES", 4)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device, **options: empty(*sizes, **options))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return module


def _device(monkeypatch: pytest.MonkeyPatch, is_late: Callable[[int], bool]) -> list[int]:
    """The delays, in cycles, of all calls enqueued. A call takes its number in milliseconds."""
    delays: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.call = len(delays)

        def record(self) -> None: ...

        def query(self) -> bool:
            return is_late(self.call)

        def elapsed_time(self, end: Any) -> float:
            assert end.call == self.call
            return float(self.call)

    monkeypatch.setattr(torch.cuda, "_sleep", delays.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return delays


def test_a_sample_that_the_host_delayed_is_taken_again(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    delays = _device(monkeypatch, lambda call: call in (2, 3))  # of the first sample after the warm-up
    assert timing.device_times([(nullcontext, lambda: None)], rounds=2) == [4.5]  # the median of 4 and 5
    delay = timing.DELAY_CYCLES
    assert delays == [delay, delay, 2 * delay, 4 * delay, 4 * delay]


def test_a_call_that_waits_for_the_device_counts_behind_the_longest_delay(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays = _device(monkeypatch, lambda call: True)
    assert timing.device_times([(nullcontext, lambda: None)], rounds=1) == [5.0]
    assert [delay // timing.DELAY_CYCLES for delay in delays] == [1, 2, 4, 8, 8]
    assert delays[-1] == timing.LONGEST_DELAY
