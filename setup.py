"""Drives CMake, and nothing more: which torch to build against, whether to build CUDA kernels, and for which GPUs.

FLASH_ATTN_CUDA=1|0         CUDA kernels or none; default: if nvcc is there and the torch found is not CPU-only
FLASH_ATTN_CUDA_ARCHS=...   compute capabilities, such as "80;90"; default: see default_archs
FLASH_ATTN_CMAKE_ARGS=...   more arguments for CMake

Object files stay in build/, so that an unchanged tree builds in seconds, whoever asks for it: see `build_folder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)
LIBRARIES = ("libflash_attn.so", "small_calls.so")  # in flash_attn/lib
OLDEST = ".".join(map(str, OLDEST_TORCH))
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


# What compilers and CMake read from the environment.
COMPILER_VARIABLES = (
    *("CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS"),
    *("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
)


def find_tool(name: str, folder: str) -> str:
    """The program that the Python package `name` brings, as pip's isolated build has it; else the one on PATH."""
    found = None
    if importlib.util.find_spec(name) is not None:
        found = shutil.which(name, path=getattr(importlib.import_module(name), folder, os.devnull))
    found = found or shutil.which(name)
    if found is None:
        raise SystemExit(
            f"building flash_attn needs {name}: `pip install {name}`, or build without --no-build-isolation"
        )
    return found


def tool_version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]


def build_folder(base: Path, cuda: bool, settings: list[str]) -> Path:
    """Where the object files of this configuration stay, for the next build to find.

    Its name depends on what compiles all of them anew: the settings, the compilers' environment, and the tools, since
    each release of CMake writes other commands and each of Ninja another log. The torch and the Python to build
    against are not in it: the few files that see them compile in seconds. Ninja finds whatever else has changed.
    """
    settings = [*settings, *(f"{name}={os.environ[name]}" for name in COMPILER_VARIABLES if os.environ.get(name))]
    text = "\n".join(settings) + "\n"
    folder = base / f"{'cuda' if cuda else 'cpu'}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configuration.txt").write_text(text)
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder: two Pythons may install from one clone at once."""
    import fcntl  # not on Windows, where setup.py still has to say that it builds on Linux only

    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class CleanBuild(build):
    """Starts from empty folders of setuptools': whatever lies in them goes into the wheel, removed modules too."""

    def run(self) -> None:
        base = Path(self.build_base)
        for leftover in [Path(self.build_lib), *base.glob("bdist.*")]:
            if leftover.resolve().is_relative_to(base.resolve()) and leftover.resolve() != base.resolve():
                shutil.rmtree(leftover, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        if sys.platform != "linux":
            raise SystemExit(
                f"flash_attn builds on Linux only, and this is {sys.platform}; on Windows it builds inside WSL 2"
            )
        # The base class clears `inplace` while it runs, and copies extensions afterwards.
        self.into_source = bool(self.inplace and not self.editable_mode)
        super().run()

    def copy_extensions_to_source(self) -> None:
        """Nothing: CMake has installed them."""

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def target_package(self) -> Path:
        """The folder that gets the built files.

        An editable install has them in site-packages, where uninstalling finds them, and each Python its own;
        flash_attn/portions.py joins that folder to the package in the source tree.
        """
        if self.editable_mode:
            return Path(self.get_finalized_command("install").install_lib).resolve() / "flash_attn"
        return (SOURCE if self.into_source else Path(self.build_lib).resolve()) / "flash_attn"

    def build_extension(self, extension: setuptools.Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(f"building flash_attn needs torch >= {OLDEST}: `pip install torch` first")
        nvcc = find_nvcc()
        cuda, reason = cuda_decision(torch, nvcc)
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        settings = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFLASH_ATTN_CUDA={'ON' if cuda else 'OFF'}",
            *shlex.split(os.environ.get("FLASH_ATTN_CMAKE_ARGS", "")),
        ]
        if cuda:
            archs = os.environ.get("FLASH_ATTN_CUDA_ARCHS") or default_archs(self.editable_mode or self.into_source)
            settings += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFLASH_ATTN_CUDA_ARCHS={archs}"]
        base = SOURCE / self.get_finalized_command("build").build_base
        folder = build_folder(base, cuda, [tool_version(cmake), f"ninja {tool_version(ninja)}", *settings])
        print(
            f"flash_attn: torch {torch.version} at {torch.path}; CUDA kernels: {cuda} ({reason}); {folder}", flush=True
        )
        with locked(folder):
            # The cache names the tools and the torch of the build that wrote it, which may be gone: pip deletes those
            # of an isolated build. Without it CMake looks for all of them anew, and object files stay valid.
            (folder / "CMakeCache.txt").unlink(missing_ok=True)
            configure = [cmake, "-G", "Ninja", "-S", str(SOURCE), "-B", str(folder), f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            configure += [f"-DTORCH_DIR={torch.path}", f"-DTORCH_VERSION={torch.version}"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DFLASH_ATTN_CUDA_REASON={reason}", *settings]
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(folder)], check=True)
            if self.editable_mode:
                remove_inplace_build()
            subprocess.run([cmake, "--install", str(folder), "--prefix", str(self.target_package())], check=True)

    def get_outputs(self) -> list[str]:
        if self.editable_mode or self.inplace or getattr(self, "into_source", False):
            return []
        package = Path(self.build_lib) / "flash_attn"
        module = Path(self.get_ext_fullpath("flash_attn._C")).name
        return [str(package / module), *(str(package / "lib" / name) for name in LIBRARIES)]


def remove_inplace_build() -> None:
    """Built files in the source tree would hide those that an editable install brings."""
    package = SOURCE / "flash_attn"
    for path in [*(package / "lib" / name for name in LIBRARIES), *package.glob("_C.*.so")]:
        if path.exists():
            print(f"flash_attn: removing {path}, which would hide what is installed", flush=True)
            path.unlink()


setuptools.setup(
    ext_modules=[setuptools.Extension("flash_attn._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
    # Only when there is no torch to build against: setuptools reports it to pip, which then brings one.
    setup_requires=[f"torch>={OLDEST}"] if sys.platform == "linux" and not find_torch() else [],
)
