"""What a build leaves behind, what a wheel, an editable install and the source distribution contain."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

import flash_attn

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="builds on Linux only")

_BUILDS = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
_CMAKE = """
    cmake_minimum_required(VERSION 3.24)
    project(stub LANGUAGES CXX)
    add_library(flash_attn SHARED library.cpp)
    install(TARGETS flash_attn LIBRARY DESTINATION lib)
    add_library(_C MODULE module.cpp)
    set_target_properties(_C PROPERTIES PREFIX "" OUTPUT_NAME "_C.stub")
    install(TARGETS _C LIBRARY DESTINATION .)
"""
_PYPROJECT = """
    [build-system]
    requires = ["setuptools"]
    build-backend = "setuptools.build_meta"
    [project]
    name = "flash-attn"
    version = "2.9.0"
    [tool.setuptools]
    package-dir = { "" = "." }
    packages = ["flash_attn"]
"""


def _tool(name: str) -> Path | None:
    module = importlib.util.find_spec(name)
    if module is not None:
        folder = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name]
        found = shutil.which(name, path=getattr(importlib.import_module(name), folder, os.devnull))
        if found is not None:
            return Path(found)
    found = shutil.which(name)
    return Path(found) if found is not None else None


class Project:
    """A small project, built by this project's setup.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clone"
        self.tools = folder / "tools"
        (self.folder / "flash_attn").mkdir(parents=True)
        for name in ("__init__", "removed_later"):
            (self.folder / "flash_attn" / f"{name}.py").touch()
        shutil.copy(ROOT / "setup.py", self.folder)
        (self.folder / "CMakeLists.txt").write_text(textwrap.dedent(_CMAKE))
        (self.folder / "pyproject.toml").write_text(textwrap.dedent(_PYPROJECT))
        (self.folder / "library.cpp").write_text("int library() { return 1; }\n")
        (self.folder / "module.cpp").write_text("int module() { return 1; }\n")

    def install_tools(self, name: str) -> Path:
        """cmake and ninja as pip's isolated build has them: Python packages in a folder that is deleted later."""
        folder = self.tools / name
        for tool, constant in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
            real = _tool(tool)
            if real is None:
                pytest.skip(f"{tool} is not installed")
            (folder / tool).mkdir(parents=True)
            (folder / tool / "__init__.py").write_text(f"{constant} = {str(folder / tool)!r}\n")
            script = folder / tool / tool
            script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
            script.chmod(0o755)
        return folder

    def build(self, kind: str, tools: str, **environment: str) -> tuple[list[str], str]:
        """The files of a fresh "wheel" or "editable" wheel, and what the build printed."""
        folder, output = self.install_tools(tools), self.folder.parent / f"wheels-{tools}"
        variables = {"PYTHONPATH": str(folder), "FLASH_ATTN_CUDA": "0", "CXXFLAGS": "", **environment}
        run = subprocess.run(
            [sys.executable, "-c", _BUILDS.format(kind), str(output)],
            cwd=self.folder,
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        shutil.rmtree(folder)
        (wheel,) = output.glob("*.whl")
        return zipfile.ZipFile(wheel).namelist(), run.stdout


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def _setup_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("flash_attn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_UNCHANGED = "ninja: no work to do"


def test_a_build_whose_tools_are_deleted_serves_the_next_one_however_it_is_started(project: Project) -> None:
    _, first = project.build("wheel", "first")
    assert _UNCHANGED not in first
    for kind, tools in (("wheel", "second"), ("editable", "third"), ("wheel", "fourth")):
        files, printed = project.build(kind, tools)
        assert _UNCHANGED in printed, printed
        assert "flash_attn/lib/libflash_attn.so" in files


def test_other_options_have_objects_of_their_own_and_none_stays_in_force(project: Project) -> None:
    option = {"FLASH_ATTN_CMAKE_ARGS": "-DCMAKE_CXX_FLAGS=-DOPTION"}
    project.build("wheel", "first")
    _, optional = project.build("wheel", "second", **option)
    assert _UNCHANGED not in optional
    assert _UNCHANGED in project.build("wheel", "third")[1]
    assert _UNCHANGED in project.build("wheel", "fourth", **option)[1]
    commands = [path.read_text() for path in project.folder.glob("build/*/build.ninja")]
    assert sorted("-DOPTION" in text for text in commands) == [False, True]


def test_what_has_changed_is_compiled(project: Project) -> None:
    project.build("wheel", "first")
    (project.folder / "library.cpp").write_text("int library() { return 2; }\n")
    _, printed = project.build("wheel", "second")
    assert "library.cpp.o" in printed and "module.cpp.o" not in printed


def test_what_is_no_longer_in_the_tree_is_in_no_wheel(project: Project) -> None:
    files, _ = project.build("wheel", "first")
    assert "flash_attn/removed_later.py" in files and "flash_attn/_C.stub.so" in files
    (project.folder / "flash_attn" / "removed_later.py").unlink()
    text = textwrap.dedent(_CMAKE)
    (project.folder / "CMakeLists.txt").write_text(text[: text.index("add_library(_C")])
    stale = project.folder / "build" / "bdist.linux-x86_64" / "wheel" / "flash_attn" / "interrupted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    files, _ = project.build("wheel", "second")
    assert sorted(name for name in files if name.startswith("flash_attn/")) == [
        "flash_attn/__init__.py",
        "flash_attn/lib/libflash_attn.so",
    ]


def test_an_editable_install_leaves_nothing_in_the_source_tree(project: Project) -> None:
    hiding = project.folder / "flash_attn" / "lib" / "libflash_attn.so"
    hiding.parent.mkdir()
    hiding.touch()
    files, _ = project.build("editable", "first")
    assert {"flash_attn/_C.stub.so", "flash_attn/lib/libflash_attn.so"} < set(files)  # so uninstalling removes them
    assert [name for name in files if name.endswith(".pth")], "a .pth file leads to the source tree"
    assert not [name for name in files if name.startswith("flash_attn/") and name.endswith(".py")]
    assert list(project.folder.glob("flash_attn/**/*.so")) == []


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_told_that_it_builds_on_linux_only(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _setup_module(monkeypatch)
    command = module.CMakeBuild(setuptools.Distribution())
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(SystemExit, match=f"Linux only, and this is {platform}"):
        command.run()


def test_the_source_distribution_has_what_building_testing_and_measuring_need(tmp_path: Path) -> None:
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0 or "setup.py" not in listing.stdout.split():
        pytest.skip("not in a git repository")
    tracked = listing.stdout.splitlines()
    for name in tracked:
        if (ROOT / name).exists():
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "tree" / name)
    command = [sys.executable, "-c", _BUILDS.format("sdist"), str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "tree", check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.split("/", 1)[-1] for name in file.getnames()}
    needed = re.compile(r"(csrc|flash_attn|tests|benchmarks|examples|\.ci)/|[^/.]+(\.(py|toml|md|txt))?$")
    assert [name for name in tracked if needed.match(name) and name not in packed] == []


def _run_python(code: str, *path: Path) -> str:
    """What a fresh Python prints, with folders put before everything else on its path."""
    package = Path(flash_attn.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, package]))}
    run = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def _portion(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / "flash_attn" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "flash_attn" / file).write_text("origin = __file__\n")
    return folder


def test_the_cute_package_of_flash_attn_4_can_lie_in_another_folder(tmp_path: Path) -> None:
    portion = _portion(tmp_path, "cute/__init__.py")
    code = "import flash_attn.cute; print(flash_attn.cute.origin, hasattr(flash_attn, 'FlashMHA'))"
    assert _run_python(code, portion) == f"{portion}/flash_attn/cute/__init__.py True"


def test_another_package_of_the_same_name_is_not_joined(tmp_path: Path) -> None:
    other = _portion(tmp_path, "__init__.py", "bert_padding.py")
    code = f"import sys, flash_attn; sys.path.append({str(other)!r})\n"
    code += "from flash_attn.portions import with_portions\n"
    code += f"print({str(other)!r} in ' '.join(with_portions('flash_attn', [])))"
    assert _run_python(code) == "False"


def test_the_version_that_others_read_is_the_packages() -> None:
    assert flash_attn.__version__.startswith("2."), "code of others asks for flash_attn 2"
    try:
        installed = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("it runs from a source tree that is not installed")
    assert installed == flash_attn.__version__
