"""The order of the Hopper backward kernels' tiles: what a tile waits for comes before it.

backward_order.cu is compiled here, for which `nvcc` must be there. It runs on the host.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("order") / "libbackward_order.so"
    sources = [ROOT / "tests/backward_order.cu", ROOT / "csrc/cuda/sm90/backward_plan.cpp"]
    flags = ["-std=c++17", "-O2", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    assert NVCC is not None
    subprocess.run([NVCC, *flags, "-shared", "-cudart=static", *map(str, sources), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("seed", range(4))
def test_no_tile_waits_for_a_later_one(library: ctypes.CDLL, seed: int) -> None:
    counts = (ctypes.c_int * 5)()
    library.check_backward_order.restype = ctypes.c_char_p
    assert library.check_backward_order(500, seed, counts).decode() == ""
    assert all(count >= 20 for count in counts), "turns, prepared rows, dq written, last groups, packed sequences"
