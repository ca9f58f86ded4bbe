"""How CUDA kernels find the blocks of packed sequences, and how many a grid has.

sequence_blocks.cu is compiled here, for which `nvcc` must be there. It runs on the host.
"""

from __future__ import annotations

import ctypes

import pytest

from nvcc import compiled, needs_nvcc

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("sequence_blocks"), "tests/sequence_blocks.cu")


@pytest.mark.parametrize("seed", range(4))
def test_every_block_is_found_once_whatever_the_bound(library: ctypes.CDLL, seed: int) -> None:
    library.check_sequence_blocks.restype = ctypes.c_char_p
    assert library.check_sequence_blocks(200, seed).decode() == ""


@pytest.mark.parametrize(("batch", "length"), [(512, 100), (64, 100), (1, 4096), (2048, 1)])
def test_a_grid_does_not_grow_with_a_careless_bound(library: ctypes.CDLL, batch: int, length: int) -> None:
    library.count_blocks.restype = ctypes.c_int64
    close, total, careless = (
        library.count_blocks(ctypes.c_int64(batch), ctypes.c_int64(length), ctypes.c_int64(bound), 64)
        for bound in (length, batch * length, 1 << 20)
    )
    assert close == batch * -(-length // 64)
    assert close <= total <= close + batch
    assert careless <= close + batch
