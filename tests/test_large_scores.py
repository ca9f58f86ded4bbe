"""Scores far beyond those of training: float32 holds them, what is computed of them has to be finite and right."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn import scaled_dot_product_attention as sdpa

FORCED = os.environ.get("FLASH_ATTN_FORCE")
FAMILIES = ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("sm90", "sm80", "universal"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# For the smallest number: of float32, whatever q is.
SHIFTS = [0.0, *(2.0**e for e in (8, 12, 16, 20, 24, 26, 30, 100)), -torch.finfo(torch.float32).min]


@pytest.fixture
def device(family: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if family == "cpu":
        return "cpu"
    if FORCED not in (None, family):
        pytest.skip("another family is forced")
    monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    return "cuda"


def _products(
    magnitude: float, negative: bool, dtype: torch.dtype, device: str, queries: int, keys: int, head_dim: int
) -> list[torch.Tensor]:
    """q and k whose scores are of this size, of both signs or all below 0, and v and dout."""
    size = math.sqrt(magnitude)
    q, k = (torch.randn(1, 2, n, head_dim) * size for n in (queries, keys))
    if negative:
        q, k = q.abs(), -k.abs()
    v, dout = (torch.randn(1, 2, n, head_dim) for n in (keys, queries))
    return [x.to(device, dtype) for x in (q, k, v, dout)]


def _differentiate(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = sdpa(*inputs, mask)
    return (out, *torch.autograd.grad(out, inputs, dout))


def _assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """P of the reference that a kernel takes need not be 1, and is rounded then."""
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def _largest(dtype: torch.dtype) -> float:
    """Of scores whose q and k the dtype holds."""
    return 1e8 if dtype == torch.float16 else 1e30


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("negative", [False, True], ids=["mixed", "negative"])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_any_size(
    family: str, device: str, dtype: torch.dtype, head_dim: int, negative: bool, masked: bool
) -> None:
    """
    Rows in which one score is far above all others have its v; no P is above 1, so that dv is at most a sum of |dout|.
    """
    for magnitude in (1e3, 1e6, 1e8, 1e12, 1e30):
        if magnitude > _largest(dtype):
            continue
        q, k, v, dout = _products(magnitude, negative, dtype, device, 130, 200, head_dim)
        mask = torch.rand(130, 200, device=device) > 0.1 if masked else None
        out, dq, dk, dv = _differentiate(q, k, v, dout, mask)
        assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv)), magnitude
        scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(head_dim)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        best = scores.topk(2, -1)
        largest = q.double().norm(dim=-1) * k.double().norm(dim=-1).amax(-1, keepdim=True) / math.sqrt(head_dim)
        decided = best.values[..., 0] - best.values[..., 1] > 30 + largest * 2.0**-18
        assert decided.double().mean() > 0.5
        winner = v.gather(-2, best.indices[..., :1].expand(*best.indices.shape[:-1], head_dim))
        _assert_close(out[decided], winner[decided])
        eps = torch.finfo(dtype).eps
        assert (dv.double().abs() <= dout.double().abs().sum(-2, keepdim=True) * (1 + 4 * eps)).all(), magnitude


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_that_a_mask_makes_large(family: str, device: str, dtype: torch.dtype, shift: float) -> None:
    """
    Beside the same scores rounded to float32, in float64. With a backward that had nothing but lse the errors would be
    up to shift times 2^-24.
    """
    q, k, v, dout = _products(1.0, False, dtype, device, 100, 200, 64)
    mask = torch.full((100, 200), -shift, device=device)
    mask[50:] = 0.0  # beside usual rows
    scores = (q.double() @ k.double().transpose(-1, -2) / 8).float() + mask
    p = torch.softmax(scores.double(), -1)
    dp = dout.double() @ v.double().transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / 8
    expected = (p @ v.double(), ds @ k.double(), ds.transpose(-1, -2) @ q.double(), p.transpose(-1, -2) @ dout.double())
    results = _differentiate(q, k, v, dout, mask)
    assert all(torch.isfinite(x).all() for x in results)
    # Of scores of q and k, which differ by some 2^-21, some are rounded to another neighbour beside the shift.
    tolerance = 4 * torch.finfo(dtype).eps + min(shift, 2.0**16) * 2.0**-23
    keeps_sums = family != "sm80" or dtype == torch.float32
    lost = 0.0 if keeps_sums else min(shift * 2.0**-20, 200.0)  # P, which is at most 1, for 1 / 200
    for result, wanted in zip(results, expected, strict=True):
        error = ((result.double() - wanted).norm() / wanted.norm()).item()
        assert error <= tolerance + (0.0 if result is results[0] else lost), (shift, error)


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e9, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_query_and_many_keys(family: str, device: str, dtype: torch.dtype, magnitude: float) -> None:
    """Whose columns several blocks share out: what each has found is put together."""
    if magnitude > _largest(dtype):
        pytest.skip("larger than the kernels take")
    q, k, v, _ = _products(magnitude, False, dtype, device, 1, 5000, 128)
    with torch.no_grad():
        k[..., 1234, :] = q[..., 0, :] * 2  # far above all others
        _assert_close(sdpa(q, k, v)[..., 0, :], v[..., 1234, :])
        mask = torch.rand(1, 5000, device=device) > 0.1
        mask[:, 1234] = True
        _assert_close(sdpa(q, k, v, mask)[..., 0, :], v[..., 1234, :])


@pytest.mark.parametrize("flipped", [False, True], ids=["usual first", "large first"])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_usual_and_of_large_scores(
    family: str, device: str, dtype: torch.dtype, sign: int, flipped: bool
) -> None:
    """Half of the keys have scores about 0, those of the others are far below or above; some rows see one half."""
    q, k, v, dout = _products(1.0, False, dtype, device, 130, 300, 64)
    q = q.abs()
    k[..., 150:, :] = sign * (k[..., 150:, :].abs() + 0.5) * 3e3
    mask = torch.ones(130, 300, dtype=torch.bool, device=device)
    mask[40:60, 150:], mask[60:80, :150] = False, False
    if flipped:
        k, v, mask = k.flip(-2), v.flip(-2), mask.flip(-1)
    for given in (None, mask):
        out, *gradients = _differentiate(q, k, v, dout, given)
        scores = q.double() @ k.double().transpose(-1, -2) / 8
        if given is not None:
            scores = scores.masked_fill(~given, float("-inf"))
        p = torch.softmax(scores, -1)
        torch.testing.assert_close(out.double(), p @ v.double(), rtol=2e-2, atol=2e-2)
        assert all(torch.isfinite(x).all() for x in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e9, 1e12, 1e30])
def test_caches(magnitude: float) -> None:
    if magnitude > _largest(torch.bfloat16):
        pytest.skip("larger than the kernels take")
    q, k, v, _ = (x.transpose(1, 2) for x in _products(magnitude, False, torch.bfloat16, "cuda", 1, 5000, 128))
    k[:, 1234] = q[:, 0] * 2
    _assert_close(flash_attn_with_kvcache(q, k, v)[:, 0], v[:, 1234])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_scores_share_out_what_there_is(family: str, device: str, causal: bool) -> None:
    """Every score is 133120^2 8: out is the mean, and P of a single key 1."""
    q, k, v = (torch.full((1, 2, 200, 64), 133120.0, dtype=torch.bfloat16, device=device) for _ in range(3))
    v = torch.randn_like(v)
    with torch.no_grad():
        out = sdpa(q, k, v, is_causal=causal)
    counts = torch.arange(1, 201, device=device).view(-1, 1)
    mean = v.double().cumsum(-2) / counts if causal else v.double().mean(-2, keepdim=True).expand_as(v)
    torch.testing.assert_close(out.double(), mean, rtol=1e-2, atol=1e-2)
    gradients = _differentiate(q[..., :1, :], k[..., :1, :], v[..., :1, :], v[..., :1, :], None)
    assert all(torch.isfinite(x).all() for x in gradients)
    torch.testing.assert_close(gradients[0], v[..., :1, :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [0.5, 30.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_far_below_the_cap_and_beyond_it(device: str, cap: float, dtype: torch.dtype) -> None:
    """Some rows of a tile have small scores alone, others both."""
    queries, keys, head_dim = 300, 200, 64
    factor = torch.where(torch.arange(queries) % 64 < 32, 1.0, 40.0)[:, None]
    q, k, v = (torch.randn(1, n, 2, head_dim) for n in (queries, keys, keys))
    q, k, v = (x.to(dtype).to(device) for x in (q * factor[:, None] * cap / 4, k, v))
    out = flash_attn_func(q, k, v, softcap=cap)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / head_dim**0.5
    assert (scores.abs() < 0.7 * cap).all(-1).any() and (scores.abs() > cap).any()
    expected = torch.einsum("bhqk,bkhd->bqhd", (cap * torch.tanh(scores / cap)).softmax(-1), v.double())
    _assert_close(out, expected.to(dtype))


@pytest.mark.parametrize("rule", ["mask", "softcap", "alibi", "bias"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_query_that_is_nan_makes_its_row_nan_and_no_other(device: str, rule: str) -> None:
    q, k, v = (torch.randn(1, 200, 2, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(1, 1, 200, 200, device=device, dtype=torch.bool).tril()
    features: dict[str, Any] = {
        "mask": {"attn_mask": mask},
        "softcap": {"softcap": 5.0},
        "alibi": {"alibi_slopes": torch.ones(2, device=device)},
        "bias": {"attn_mask": torch.randn(1, 1, 200, 200, device=device, dtype=q.dtype)},
    }[rule]
    expected = flash_attn_func(q, k, v, **features)
    q[0, 77, 0, 5] = torch.nan
    expected[0, 77, 0] = torch.nan
    torch.testing.assert_close(flash_attn_func(q, k, v, **features), expected, rtol=0, atol=0, equal_nan=True)
