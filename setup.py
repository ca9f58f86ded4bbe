"""Drives CMake, and nothing more: which torch to build against, whether to build CUDA kernels, and for which GPUs.

FLASH_ATTN_CUDA=1|0         CUDA kernels or none; default: if nvcc is there and the torch found is not CPU-only
FLASH_ATTN_CUDA_ARCHS=...   compute capabilities, such as "80;90"; default: see default_archs
FLASH_ATTN_CMAKE_ARGS=...   more arguments for CMake
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)
# Machine code of a major version runs on its later minor versions: 8.0 serves 8.6 and 8.9, 10.0 serves 10.3, 12.0
# serves 12.1. PTX serves the rest: 7.5 for Turing, 12.0 for what comes.
WHEEL_ARCHS = "75-virtual;80-real;90-real;100-real;120"


class Torch:
    """An installed torch, read from its files: importing it costs seconds, and pip's isolated build cannot."""

    def __init__(self, path: Path) -> None:
        text = (path / "version.py").read_text()
        self.path = path
        self.version = re.search(r"__version__ = ['\"]([^'\"]+)", text).group(1)
        self.cuda = re.search(r"^cuda[^=]*= ['\"]([^'\"]+)", text, re.M)

    @property
    def is_new_enough(self) -> bool:
        return tuple(int(part) for part in self.version.split(".")[:2]) >= OLDEST_TORCH


def find_torch() -> Torch | None:
    """The torch on sys.path, or the target environment's: inside pip's isolated build that is still purelib."""
    places = [Path(sysconfig.get_path("purelib")) / "torch"]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        places.insert(0, Path(spec.origin).parent)
    found = [Torch(place) for place in places if (place / "version.py").exists()]
    return next((torch for torch in found if torch.is_new_enough), None)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(str(Path(home) / "bin" / "nvcc") for home in homes if home)]
    return next((nvcc for nvcc in candidates if nvcc and os.access(nvcc, os.X_OK)), None)


def cuda_decision(torch: Torch, nvcc: str | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why."""
    wish = os.environ.get("FLASH_ATTN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"FLASH_ATTN_CUDA must be 1, 0 or unset, but is {wish!r}")
    if wish == "0":
        return False, "FLASH_ATTN_CUDA=0"
    if nvcc is None:
        if wish == "1":
            raise SystemExit("FLASH_ATTN_CUDA=1, but there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
        return False, "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    if wish == "1":
        return True, "FLASH_ATTN_CUDA=1"
    if torch.cuda is None:
        return False, f"torch {torch.version} is a CPU-only build"
    return True, f"nvcc is {nvcc} and torch {torch.version} is a CUDA build"


def present_archs() -> str:
    """Compute capabilities of this machine's GPUs, as CMake writes them; empty without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ";".join(sorted({line.strip().replace(".", "") + "-real" for line in text.splitlines() if line.strip()}))


def default_archs(editable: bool) -> str:
    return (present_archs() if editable else "") or WHEEL_ARCHS


class CMakeBuild(build_ext):
    def run(self) -> None:
        # The base class clears `inplace` while it runs, and copies extensions afterwards.
        self.into_source = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def copy_extensions_to_source(self) -> None:
        """Nothing: CMake has installed into the source tree."""

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def build_extension(self, extension: setuptools.Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit("building flash_attn needs torch >= 2.11: `pip install torch` first")
        nvcc = find_nvcc()
        cuda, reason = cuda_decision(torch, nvcc)
        source = Path(__file__).parent.resolve()
        package = source / "flash_attn" if self.into_source else Path(self.build_lib).resolve() / "flash_attn"
        build = Path(self.build_temp).resolve()
        archs = os.environ.get("FLASH_ATTN_CUDA_ARCHS") or default_archs(self.into_source)
        print(f"flash_attn: torch {torch.version} at {torch.path}; CUDA kernels: {cuda} ({reason})", flush=True)
        arguments = [
            f"-DTORCH_DIR={torch.path}",
            f"-DTORCH_VERSION={torch.version}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFLASH_ATTN_CUDA={'ON' if cuda else 'OFF'}",
            f"-DFLASH_ATTN_CUDA_REASON={reason}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            "-DCMAKE_BUILD_TYPE=Release",
            *shlex.split(os.environ.get("FLASH_ATTN_CMAKE_ARGS", "")),
        ]
        if cuda:
            arguments += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFLASH_ATTN_CUDA_ARCHS={archs}"]
        subprocess.run(["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), *arguments], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        if getattr(self, "into_source", False):
            return []
        package = Path(self.build_lib) / "flash_attn"
        module = Path(self.get_ext_fullpath("flash_attn._C")).name
        return [str(package / module), str(package / "lib" / "libflash_attn.so")]


setuptools.setup(
    ext_modules=[setuptools.Extension("flash_attn._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Only when there is no torch to build against: setuptools reports it to pip, which then brings one.
    setup_requires=[] if find_torch() else ["torch>=2.11"],
)
