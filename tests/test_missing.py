"""Names of Dao's flash_attn that are not here: an import says what to use, a question gets a plain no."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import flash_attn
from flash_attn import missing


@pytest.mark.parametrize("name", sorted(missing.INSTEAD))
def test_importing_it_says_what_to_use(name: str) -> None:
    sentence = re.escape(missing.INSTEAD[name])
    with pytest.raises(ImportError, match=sentence):
        importlib.import_module(f"flash_attn.{name}")
    package, _, last = f"flash_attn.{name}".rpartition(".")
    with pytest.raises(ImportError, match=sentence):
        exec(f"from {package} import {last}")


def test_a_module_below_a_missing_one_says_it_too() -> None:
    with pytest.raises(ImportError, match=re.escape("torch.nn.functional.cross_entropy")):
        exec("from flash_attn.losses.cross_entropy import CrossEntropyLoss")


def test_the_module_of_the_functions_says_it_too() -> None:
    with pytest.raises(ImportError, match=re.escape(missing.INSTEAD["losses"])):
        exec("from flash_attn.flash_attn_interface import losses")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from flash_attn.flash_attn_interface import nothing")


def test_an_attribute_that_is_asked_for_is_just_not_there() -> None:
    assert not hasattr(flash_attn, "losses")
    assert getattr(flash_attn, "losses", None) is None
    with pytest.raises(AttributeError, match="liger-kernel"):
        flash_attn.losses  # noqa: B018


def test_names_that_nobody_has_fail_as_anywhere() -> None:
    with pytest.raises(ModuleNotFoundError, match=re.escape("No module named 'flash_attn.nothing'")):
        importlib.import_module("flash_attn.nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'flash_attn'"):
        exec("from flash_attn import nothing")
    with pytest.raises(AttributeError, match="module 'flash_attn' has no attribute 'nothing'"):
        flash_attn.nothing  # noqa: B018


def test_what_is_in_the_table_is_really_missing() -> None:
    package = Path(flash_attn.__file__).parent
    for name in missing.INSTEAD:
        path = package.joinpath(*name.split("."))
        assert not path.is_dir() and not path.with_suffix(".py").exists(), f"{name} exists: take it out of the table"
        assert name not in flash_attn.__all__


def test_importing_the_package_again_adds_no_second_finder() -> None:
    def finders() -> int:
        return sum(type(finder).__module__ == "flash_attn.missing" for finder in sys.meta_path)

    assert finders() == 1
    missing.explain_imports()
    assert finders() == 1
