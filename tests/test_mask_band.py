"""Dense masks that are causal order or a window, which the device finds out: then kernels without bits do the work."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attn import flash_attn_func, prepare_mask
from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.masks import packed_mask
from introspection import needs_kernels
from plans import plan
from problems import replayed

UNBOUNDED = 1 << 30
Index = Callable[[Tensor, Tensor], Tensor]

BANDS: dict[str, tuple[Index, int, int]] = {  # of 700 rows and 1000 columns
    "causal": (lambda i, j: j <= i + 300, -UNBOUNDED, 300),
    "causal and some more": (lambda i, j: j <= i + 317, -UNBOUNDED, 317),
    "window": (lambda i, j: (j <= i + 300) & (j >= i - 100), -100, 300),
    "both sides": (lambda i, j: (j <= i + 302) & (j >= i - 3), -3, 302),
    "all": (lambda i, j: i >= 0, -UNBOUNDED, UNBOUNDED),
    "later columns": (lambda i, j: j >= i, 0, UNBOUNDED),
    "between corners": (lambda i, j: (j >= i) & (j <= i + 300), 0, 300),
}
OTHERS: dict[str, Index] = {
    "nothing": lambda i, j: (i < 0) & (j < 0),
    "rows without columns": lambda i, j: j <= i - 128,
    "causal, columns without rows": lambda i, j: j <= i + 299,
    "first columns without rows": lambda i, j: j >= i + 1,
    "one diagonal": lambda i, j: j == i,
    "one score more": lambda i, j: (j <= i + 300) | (i == 130) & (j == 440),
    "one score less": lambda i, j: (j <= i + 300) & ((i != 650) | (j != 100)),
    "padding": lambda i, j: (j < 900) & (i >= 0),
    "documents": lambda i, j: i // 100 == j // 100,
    "documents of whole cells": lambda i, j: i // 128 == j // 128,
    "prefix": lambda i, j: (j <= i) | (j < 64),
    "two windows": lambda i, j: (j <= i) & (j >= i - 30) | (j >= i + 400) & (j <= i + 430),
}


def _mask(rule: Index, rows: int = 700, cols: int = 1000) -> Tensor:
    return rule(torch.arange(rows, device="cuda")[:, None], torch.arange(cols, device="cuda")).expand(rows, cols)


def _band(keep: Tensor) -> tuple[int, int] | None:
    shape = (1, 1, *keep.shape)
    return packed_mask.band(packed_mask.pack(keep.contiguous().view(shape)), shape)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BANDS)
def test_a_band_is_found(name: str) -> None:
    rule, left, right = BANDS[name]
    assert _band(_mask(rule)) == (left, right)
    values = torch.zeros(700, 1000, device="cuda").masked_fill(~_mask(rule), -torch.inf)
    assert _band(values) == (left, right)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_band_is_none(name: str) -> None:
    assert _band(_mask(OTHERS[name])) is None


@pytest.mark.gpu
def test_a_mask_with_values_is_none() -> None:
    assert _band(torch.ones(700, 1000, device="cuda").tril()) is None
    keep = _mask(BANDS["causal"][0])
    assert (
        _band(
            torch.zeros(700, 1000, device="cuda")
            .masked_fill(~keep, -torch.inf)
            .index_fill(1, keep.new_zeros(1, dtype=torch.int64), 1.0)
        )
        is None
    )


def test_nobody_has_looked_where_a_cpu_or_python_packs() -> None:
    keep = torch.ones(600, 600, dtype=torch.bool).tril()
    shape = (1, 1, 600, 600)
    assert packed_mask.band(packed_mask.pack(keep.view(shape)), shape) is None

    def rows_of(first: int, end: int) -> Tensor:
        return keep.view(shape)[:, :, first:end]

    packed = packed_mask.pack_by_rows(shape, keep.device, rows_of)
    assert packed_mask.band(packed, shape) is None
    assert packed.shape == (packed_mask.num_words(shape),)


@needs_kernels("sm90")
@pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced")
def test_large_problems_whose_mask_may_be_a_band_have_a_kernel_for_it() -> None:
    mask = (1 << 20, "bool", 0, [1, 1, 4096, 4096], [0, 0, 4096, 1])
    slopes = (1 << 20, "float32", 0, [16], [1])
    for head_dim in (64, 96, 128, 192, 256):
        assert plan(head_dim=head_dim, tensors={"attn_mask": mask})["forward"]["decisions"]["if_band"].endswith("band")
    for tensors in (
        {"attn_mask": (1 << 20, "bool", 0, [4, 1, 4096, 4096], [4096 * 4096, 0, 4096, 1])},
        {"attn_mask": mask, "alibi_slopes": slopes},
    ):
        assert plan(tensors=tensors)["forward"]["decisions"]["if_band"] == "none"
    assert plan(tensors={"attn_mask": mask}, causal=1)["forward"]["decisions"]["if_band"] == "none"


LARGE = {
    "causal": lambda i, j: j <= i,
    "causal from the last column": lambda i, j: j <= i + 77,
    "window": lambda i, j: (j <= i) & (j >= i - 200),
    "window from the last column": lambda i, j: (j <= i + 77) & (j >= i - 200),
    "both sides": lambda i, j: (j <= i + 100) & (j >= i - 333),
    "rows without columns": lambda i, j: j <= i - 300,
    "no band": lambda i, j: (j <= i) & ((i + j) % 7 != 0),
    "nearly causal": lambda i, j: (j <= i) | (i == 3) & (j == 4),
}


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", LARGE)
def test_attention_under_a_large_mask_is_that_of_the_mask(name: str, head_dim: int, prepared: bool) -> None:
    """Some heads against float64; the others against the family's kernels without the rule, which is bent."""
    rows, cols, heads = 1500, 1577, 12
    keep = _mask(LARGE[name], rows, cols)
    q = torch.randn(8, heads, rows, head_dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.randn(8, heads, cols, head_dim, device="cuda", dtype=q.dtype).requires_grad_() for _ in range(2))
    dout = torch.randn_like(q)
    out = sdpa(q, k, v, prepare_mask(keep) if prepared else keep)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    seen = keep.any(1)
    for b, h in ((0, 0), (7, 11)):
        inputs = [x[b, h].detach().double().requires_grad_() for x in (q, k, v)]
        scores = (inputs[0] @ inputs[1].T / head_dim**0.5).masked_fill(~keep, -torch.inf)
        expected = torch.where(seen[:, None], scores.softmax(-1), 0.0).nan_to_num() @ inputs[2]
        scores = scores[seen]
        attended = scores.softmax(-1) @ inputs[2]
        truths = torch.autograd.grad(attended, inputs, dout[b, h][seen].double())
        assert (out[b, h].double() - expected).norm() <= 5e-3 * expected.norm()
        assert (out[b, h][~seen] == 0).all()
        for x, truth in zip(grads, truths, strict=True):
            assert (x[b, h].double() - truth).norm() <= 8e-3 * truth.norm()


@pytest.mark.gpu
def test_a_graph_finds_out_anew() -> None:
    """The mask is another one when it is replayed, or the same once more."""
    q, k, v = (torch.randn(4, 2048, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    i, j = torch.arange(2048, device="cuda")[:, None], torch.arange(2048, device="cuda")
    masks = [j <= i, (j <= i) & (j >= i - 500), (j <= i) & ((i + j) % 3 != 0), j <= i, j <= i]
    for mask, out in replayed(lambda mask: flash_attn_func(q, k, v, attn_mask=mask), masks):
        assert torch.equal(out, flash_attn_func(q, k, v, attn_mask=mask.clone()))
