"""Additive masks of nothing but 0 and -inf, which the device finds out: then kernels of boolean masks do the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn import flash_attn_func, prepare_mask
from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.masks import packed_mask
from introspection import needs_kernels
from plans import plan
from problems import replayed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXACT = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 8e-3, torch.float16: 2e-3}
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of batch entry b (batch, 1, 1, 1), row i (rows, 1), column j: as small as the rule allows.
RULES: dict[str, Rule] = {
    "padding": lambda b, i, j: j < j.numel() - 77 * b - 1,
    "padding, an entry without keys": lambda b, i, j: (j < 400 + 100 * b) & (b != 0),
    "documents": lambda b, i, j: i // 190 == j // 190,
    "documents of an entry": lambda b, i, j: i // (190 + b) == j // (190 + b),
    "causal": lambda b, i, j: j <= i,
    "causal from the last column": lambda b, i, j: j <= i + j.numel() - i.numel(),
    "window": lambda b, i, j: (j <= i + j.numel() - i.numel()) & (j >= i - 200),
    "rows without columns": lambda b, i, j: (j <= i - 30) & (i % 5 != 0),
    "scattered": lambda b, i, j: (7 * i + 3 * j + i * j) % 5 != 0,
    "all": lambda b, i, j: (i >= 0) & (j >= 0),
}


def _keep(name: str, batch: int, rows: int, cols: int, device: str) -> Tensor:
    """Four dimensions, of 1 where the rule allows."""
    b = torch.arange(batch, device=device)[:, None, None, None]
    keep = RULES[name](b, torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device))
    return keep[(None,) * (4 - keep.ndim)]


def _bias(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, -torch.inf)


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dout: Tensor) -> tuple[list[Tensor], Tensor]:
    """out, dq, dk and dv of one head, (rows, columns) each, in float64; and whether a row sees something."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    bias = bias.double()
    hidden = bias == -torch.inf
    # What nobody sees may be NaN.
    unseen = hidden.all(0)[:, None]
    q64, k64, v64 = leaves[0], leaves[1].masked_fill(unseen, 0.0), leaves[2].masked_fill(unseen, 0.0)
    seen = ~hidden.all(1, keepdim=True)
    scores = (q64 @ k64.T / q.shape[-1] ** 0.5 + bias.masked_fill(hidden, 0.0)).masked_fill(hidden & seen, -torch.inf)
    out = torch.where(seen, scores.softmax(-1) @ v64, 0.0)
    return [out, *torch.autograd.grad(out, leaves, dout.double())], seen[:, 0]


def _check(
    bias: Tensor, tensors: list[Tensor], mask: Any, dout: Tensor, heads: list[tuple[int, int]], **options: Any
) -> list[Tensor]:
    """Some heads against the reference. bias: four dimensions."""
    q, k, v = tensors
    out = sdpa(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1], **options)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    group, exact = q.shape[1] // k.shape[1], EXACT[q.dtype]
    whole = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for b, h in heads:
        members = range(h // group * group, h // group * group + group)
        results = [_reference(q[b, n], k[b, h // group], v[b, h // group], whole[b, n], dout[b, n]) for n in members]
        truths, seen = results[h % group]
        truths[2:] = [torch.stack([of_head[i] for of_head, _ in results]).sum(0) for i in (2, 3)]
        found = [out[b, h], gradients[0][b, h], gradients[1][b, h // group], gradients[2][b, h // group]]
        for x, truth in zip(found, truths, strict=True):
            assert (x.double() - truth).norm() <= exact * truth.norm() + 1e-30
        assert (out[b, h][~seen] == 0).all() and (gradients[0][b, h][~seen] == 0).all()
    return [out.detach(), *gradients]


def _tensors(
    batch: int, heads: int, heads_k: int, rows: int, cols: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor]:
    shapes = ((batch, heads, rows, head_dim), *((batch, heads_k, cols, head_dim),) * 2)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.float32).to(dtype) for shape in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()], torch.randn_like(q)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_small_one_is_that_of_its_values(name: str, expanded: bool, dtype: torch.dtype, device: str) -> None:
    tensors, dout = _tensors(2, 4, 2, 190, 200, 32, dtype, device)
    bias = _bias(_keep(name, 2, 190, 200, device), dtype)
    mask = bias.expand(2, 4, 190, 200) if expanded else bias
    _check(bias, tensors, mask, dout, [(0, 0), (0, 3), (1, 1)])


def test_an_expanded_one_has_its_gradient_in_the_shape_that_was_given() -> None:
    (q, k, v), _ = _tensors(2, 4, 4, 30, 40, 16, torch.float64, "cpu")
    bias = torch.randn(2, 1, 1, 40, dtype=torch.float64)
    sums = []
    for mask in (bias.clone(), bias.expand(2, 4, 30, 40)):
        mask = mask.detach().requires_grad_()
        out = sdpa(q, k, v, mask)
        (gradient,) = torch.autograd.grad(out.square().sum(), mask)
        assert gradient.shape == mask.shape
        sums.append(gradient.sum((1, 2), keepdim=True) if gradient.shape[2] > 1 else gradient)
    torch.testing.assert_close(*sums)


BIASES = [torch.bfloat16, torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BIASES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("name", RULES)
def test_attention_under_a_large_one_is_that_of_its_values(name: str, head_dim: int, dtype: torch.dtype) -> None:
    tensors, dout = _tensors(8, 12, 12, 1500, 1577, head_dim, torch.bfloat16, "cuda")
    bias = _bias(_keep(name, 8, 1500, 1577, "cuda"), dtype)
    _check(bias, tensors, bias, dout, [(0, 0), (7, 11)])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["padding", "documents of an entry", "causal"])
def test_a_large_one_with_everything_else(name: str, head_dim: int) -> None:
    """As an expanded tensor, prepared, with heads that share keys, in a fixed order, in fp16."""
    tensors, dout = _tensors(8, 12, 12, 1536, 1536, head_dim, torch.bfloat16, "cuda")
    bias = _bias(_keep(name, 8, 1536, 1536, "cuda"), torch.bfloat16)
    heads = [(0, 0), (7, 11)]
    _check(bias, tensors, bias.expand(8, 12, 1536, 1536), dout, heads)
    _check(bias, tensors, prepare_mask(bias), dout, heads)
    for _ in range(2):
        torch.use_deterministic_algorithms(True)
        try:
            _check(bias, tensors, bias, dout, heads)
        finally:
            torch.use_deterministic_algorithms(False)
    tensors, dout = _tensors(8, 12, 4, 1536, 1536, head_dim, torch.float16, "cuda")
    _check(bias, tensors, bias.to(torch.float16), dout, heads)
    _check(bias, tensors, bias.float(), dout, heads)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("value", [1.5, torch.finfo(torch.bfloat16).min, torch.nan])
def test_one_number_more_makes_it_another(value: float, head_dim: int) -> None:
    """The smallest number hides nothing where a row has nothing else, and NaN makes a row NaN."""
    (q, k, v), dout = _tensors(8, 12, 12, 1500, 1577, head_dim, torch.bfloat16, "cuda")
    keep = _keep("documents", 8, 1500, 1577, "cuda")
    for row, col in ((0, 0), (1499, 1450), (700, 690)):
        bias = _bias(keep, torch.bfloat16)
        bias[..., row, col] = value
        if value != value:
            out = sdpa(q, k, v, bias)
            assert out[:, :, row].isnan().all()
            assert not out[:, :, torch.arange(1500) != row].isnan().any()
        else:
            _check(bias, [q, k, v], bias, dout, [(0, 0), (7, 11)])
            _check(bias, [q, k, v], prepare_mask(bias), dout, [(7, 11)])
    smallest = _bias(keep, torch.bfloat16)
    smallest[..., 300, :] = torch.finfo(torch.bfloat16).min
    _check(smallest, [q, k, v], smallest, dout, [(0, 0), (7, 11)])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["padding", "documents", "causal"])
def test_nan_where_nobody_sees_it_stays_there(name: str, head_dim: int) -> None:
    (q, k, v), dout = _tensors(8, 12, 12, 1500, 1577, head_dim, torch.bfloat16, "cuda")
    keep = _keep(name, 8, 1500, 1577, "cuda")
    unseen = ~keep.expand(8, 1, 1500, 1577).any(2)[:, 0]  # (batch, columns)
    assert unseen.any()
    k, v = (x.detach().masked_fill(unseen[:, None, :, None], torch.nan).requires_grad_() for x in (k, v))
    bias = _bias(keep, torch.bfloat16)
    for x in _check(bias, [q, k, v], bias, dout, [(0, 0), (7, 11)]):
        assert x.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [1577, 1584])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_values_of_keys_alone(head_dim: int, cols: int) -> None:
    """Padding by a large number, too, which is a value like others."""
    tensors, dout = _tensors(8, 12, 12, 1500, cols, head_dim, torch.bfloat16, "cuda")
    values = torch.randn(8, 1, 1, cols, device="cuda", dtype=torch.bfloat16)
    padded = torch.zeros_like(values).masked_fill(~_keep("padding", 8, 1, cols, "cuda"), -65504.0)
    for bias in (values, padded):
        _check(bias, tensors, bias, dout, [(0, 0), (7, 11)])
    _check(values, tensors, values.expand(8, 12, 1500, cols), dout, [(7, 11)])


@pytest.mark.gpu
def test_rules_of_scores_beside_it() -> None:
    q, k, v = (torch.randn(8, 1500, 12, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    keep = _keep("documents of an entry", 8, 1500, 1500, "cuda")
    slopes = torch.linspace(0.1, 0.9, 12, device="cuda")
    for options in ({"causal": True}, {"softcap": 5.0}, {"alibi_slopes": slopes}, {"window_size": (300, 100)}):
        results = []
        for mask in (keep, _bias(keep, torch.bfloat16)):
            out = flash_attn_func(q, k, v, attn_mask=mask, **options)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        for x, y in zip(*results, strict=True):
            assert (x - y).float().norm() <= 1e-2 * y.float().norm()


@pytest.mark.gpu
def test_a_graph_finds_out_anew() -> None:
    q, k, v = (torch.randn(4, 2048, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    i, j = torch.arange(2048, device="cuda")[:, None], torch.arange(2048, device="cuda")
    masks = [_bias(x, torch.bfloat16) for x in (j <= i, (j <= i) & (j >= i - 500), (j <= i) & ((i + j) % 3 != 0))]
    masks += [masks[2] + 0.25 * (j % 7), masks[0], masks[2]]
    for mask, out in replayed(lambda mask: flash_attn_func(q, k, v, attn_mask=mask), masks):
        expected = flash_attn_func(q, k, v, attn_mask=mask.clone())
        torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_what_adds_only_0_is_known_of_a_packed_one(device: str) -> None:
    """On both devices, so that one may pack what the other reads."""
    for name in RULES:
        bias = _bias(_keep(name, 2, 190, 200, device), torch.float32)
        assert not _is_biased(bias)
        bias[..., -1, 100] = 1.0  # of all rows, if there is one
        assert _is_biased(bias)


def _is_biased(bias: Tensor) -> bool:
    return packed_mask.pack(bias)[-packed_mask.KIND_WORDS :].view(torch.int32)[3].item() == 1


@needs_kernels("sm90")
@pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced")
def test_large_problems_have_kernels_for_one_that_only_hides() -> None:
    def mask(batch: int, heads: int, rows: int, dtype: str = "bfloat16", expanded: bool = False) -> dict[str, Any]:
        sizes = [batch, heads, rows, 4096]
        strides = [0 if n == 1 else x for n, x in zip(sizes, (heads * rows * 4096, rows * 4096, 4096, 1), strict=True)]
        return {"attn_mask": (1 << 20, dtype, 0, [4, 16, 4096, 4096] if expanded else sizes, strides)}

    for head_dim in (64, 96, 128, 192, 256):
        for dtype in ("bfloat16", "float32"):
            for expanded in (False, True):
                for sizes, band in (((4, 1, 1), False), ((4, 1, 4096), False), ((1, 1, 4096), True)):
                    chosen = plan(head_dim=head_dim, tensors=mask(*sizes, dtype, expanded))
                    for way in chosen.values():
                        assert way["decisions"]["if_band"].endswith("band") == band
                    assert " extended" in chosen["forward"]["decisions"]["if_bits"]
                    # Where the kernel that takes values is the same, it finds them by the classes of its steps.
                    assert (chosen["backward"]["decisions"]["if_bits"] != "none") == (head_dim == 64)
    few_share, shared = mask(4, 16, 4096), mask(1, 1, 4096)
    sinks = {"sinks": (1 << 20, "float32", 0, [16], [1])}
    for changes in ({"tensors": few_share}, {"seqlen_q": 256, "seqlen_k": 4096, "batch": 1, "tensors": mask(1, 1, 1)}):
        assert plan(**changes)["forward"]["decisions"]["if_bits"] == "none"
    assert "if_bits" not in plan(tensors=mask(4, 1, 4096), wants_dmask=True)["backward"]["decisions"]
    assert plan(tensors=shared | sinks)["forward"]["decisions"]["if_bits"] != "none"
    boolean = plan(tensors=mask(1, 1, 4096, "bool"))
    assert {way["decisions"]["if_bits"] for way in boolean.values()} == {"none"}
