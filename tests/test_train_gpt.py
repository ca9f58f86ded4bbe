"""The example of the README: its sizes, and that it trains the same with either attention."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_gpt.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def _arguments(example: Any, monkeypatch: pytest.MonkeyPatch, *given: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *given])
    return example.parse_arguments()


@pytest.mark.parametrize(("device", "size"), [("cpu", "small"), ("cuda", "large")])
def test_the_size_follows_the_device_and_what_is_given_goes_before(
    example: Any, monkeypatch: pytest.MonkeyPatch, device: str, size: str
) -> None:
    args = _arguments(example, monkeypatch, "--device", device)
    assert {name: getattr(args, name) for name in example.SIZES[size]} == example.SIZES[size]
    args = _arguments(example, monkeypatch, "--device", device, "--size", "small", "--context", "99")
    assert {name: getattr(args, name) for name in example.SIZES[size]} == {**example.SIZES["small"], "context": 99}


def test_both_kinds_of_attention_train_alike(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"steps": 3, "batch": 2, "context": 16, "layers": 1, "width": 16, "heads": 2, "sample": 4}
    given = ["--device", "cpu", "--dtype", "fp64", "--compare", *(f"--{name}={size}" for name, size in sizes.items())]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *given, "--out", str(tmp_path)])
    example.main()
    rows = (tmp_path / "loss.csv").read_text().split()
    ours, torchs = zip(*(map(float, row.split(",")[-2:]) for row in rows[-3:]), strict=True)
    assert ours == pytest.approx(torchs, abs=1e-12)
    assert "largest difference of the two curves" in capsys.readouterr().out
