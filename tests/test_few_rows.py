"""Few query rows on the CPU: loads of keys and values serve up to four rows, and scratch stays with its thread."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import flash_attn_func, scaled_dot_product_attention

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _inputs(rows: int, keys: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1000 * rows + keys)
    return [torch.randn(2, 3, n, head_dim, dtype=torch.float64).to(dtype) for n in (rows, keys, keys)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 33, 64, 80, 136])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_values(rows: int, head_dim: int, dtype: torch.dtype) -> None:
    for keys in (1, 7, 64, 131):
        inputs = _inputs(rows, keys, head_dim, dtype)
        expected = F.scaled_dot_product_attention(*(x.double() for x in inputs))
        out = scaled_dot_product_attention(*inputs)
        assert (out.double() - expected).abs().max() <= TOLERANCES[dtype]
        turned = [x.transpose(1, 2).contiguous() for x in inputs]  # rows of other heads lie between
        assert torch.equal(flash_attn_func(*turned).transpose(1, 2), out)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_each_row_under_a_mask_has_keys_of_its_own(rows: int) -> None:
    inputs = _inputs(rows, 131, 64, torch.float32)
    mask = torch.rand(rows, 131) < 0.3
    mask[-1] = False
    mask[-1, 130] = True
    expected = F.scaled_dot_product_attention(*(x.double() for x in inputs), mask)
    assert (scaled_dot_product_attention(*inputs, mask).double() - expected).abs().max() <= 3e-6


def test_what_comes_from_far_is_prefetched_and_nothing_else_changes() -> None:
    q, k, v = _inputs(2, 200, 64, torch.float32)
    many = [x.repeat(64, 1, 1, 1) for x in (q, k, v)]  # 39 MB
    assert torch.equal(scaled_dot_product_attention(*many)[:2], scaled_dot_product_attention(q, k, v))


def test_threads_keep_scratch_of_their_own() -> None:
    problems = [_inputs(rows, keys, 64, torch.float32) for rows, keys in ((1, 300), (16, 16), (600, 600), (5, 40))]
    expected = [scaled_dot_product_attention(*inputs) for inputs in problems]
    wrong = []

    def attend(first: int) -> None:
        for i in range(40):
            which = (first + i) % len(problems)
            if not torch.equal(scaled_dot_product_attention(*problems[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=attend, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
