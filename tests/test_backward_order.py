"""The order of the Hopper backward kernels' tiles: what a tile waits for comes before it.

backward_order.cu is compiled here, for which `nvcc` must be there. It runs on the host.
"""

from __future__ import annotations

import ctypes

import pytest

from nvcc import compiled, needs_nvcc

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    sources = [f"csrc/cuda/sm90/backward/{name}.cpp" for name in ("plan", "extended/plan", "launch")]
    sources.append("csrc/cuda/common/forced_decisions.cpp")
    return compiled(tmp_path_factory.mktemp("order"), "tests/backward_order.cu", *sources)


@pytest.mark.parametrize("seed", range(4))
def test_no_tile_waits_for_a_later_one(library: ctypes.CDLL, seed: int) -> None:
    counts = (ctypes.c_int * 8)()
    library.check_backward_order.restype = ctypes.c_char_p
    assert library.check_backward_order(2500, seed, counts).decode() == ""
    assert all(count >= 20 for count in counts), str(list(counts))
