"""Code of people who use the package passes strict type checkers: `typed_use.py` is theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attn

USE = Path(__file__).parent / "typed_use.py"
PACKAGE = Path(flash_attn.__file__).parent.parent


def _check(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a checker away from this tree, where it finds the package as installed, or where this process found it."""
    where = {} if PACKAGE.name == "site-packages" else {"MYPYPATH": str(PACKAGE)}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=os.environ | where, capture_output=True, text=True
    )


def _wrong(folder: Path) -> Path:
    """What a checker has to find: that lse takes return_lse."""
    wrong = folder / "wrong.py"
    wrong.write_text(
        "from torch import Tensor\nfrom flash_attn import flash_attn_func\n"
        "def f(q: Tensor) -> Tensor:\n    out, lse, none = flash_attn_func(q, q, q, return_lse=True)\n    return out\n"
    )
    return wrong


def test_mypy_in_strict_mode(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("mypy")
    cache = str(pytestconfig.cache.mkdir("mypy")) if pytestconfig.cache is not None else str(tmp_path)
    mypy = ("mypy", "--strict", "--follow-imports=silent", "--config-file=", "--cache-dir", cache)
    done = _check(*mypy, str(USE), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = _check(*mypy, str(_wrong(tmp_path)), folder=tmp_path)
    assert done.returncode == 1 and "wrong.py:4: error" in done.stdout, done.stdout + done.stderr


def test_pyright(tmp_path: Path) -> None:
    pytest.importorskip("basedpyright", reason="basedpyright, which is pyright with all that it runs on, is not here")
    settings = {"typeCheckingMode": "standard", "include": [str(USE)], "extraPaths": [str(PACKAGE)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = ("basedpyright", "--pythonpath", sys.executable)
    done = _check(*pyright, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = _wrong(tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings | {"include": [str(wrong)]}))
    done = _check(*pyright, folder=tmp_path)
    assert done.returncode == 1 and "wrong.py:4:" in done.stdout, done.stdout + done.stderr
