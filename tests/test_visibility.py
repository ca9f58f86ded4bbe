"""Which tiles and blocks the CUDA kernels visit and mask: as the rules of sequence.h say for each row and column.

visibility.cu is compiled here, for which `nvcc` must be there. It runs on the host.
"""

from __future__ import annotations

import ctypes

import pytest

from nvcc import compiled, needs_nvcc

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("visibility"), "tests/visibility.cu")


@pytest.mark.parametrize("seed", range(4))
def test_tiles_and_blocks_are_those_that_the_rules_give(library: ctypes.CDLL, seed: int) -> None:
    library.check_visibility.restype = ctypes.c_char_p
    assert library.check_visibility(100, seed).decode() == ""
