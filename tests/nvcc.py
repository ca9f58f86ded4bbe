"""Libraries of CUDA sources that only tests need."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def compiled(folder: Path, *sources: str) -> ctypes.CDLL:
    """The library of these files, named from the root on. It shows what is marked as visible."""
    assert NVCC is not None
    path = folder / "library.so"
    flags = ["-std=c++17", "-O2", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    files = [str(ROOT / source) for source in sources]
    subprocess.run([NVCC, *flags, "-shared", "-cudart=static", *files, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))
