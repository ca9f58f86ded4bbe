"""Rotary embeddings against complex multiplication in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flash_attn.layers import rotary
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary
from flash_attn.ops.triton.rotary import apply_rotary as apply_rotary_elsewhere


def _expected(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """x (..., rows, heads, head_dim) turned by angles (..., rows, rotary_dim / 2), as complex numbers."""
    half = angles.shape[-1]
    exact = x.double()
    turned, rest = exact[..., : 2 * half], exact[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    pairs = torch.view_as_real(product)
    return torch.cat(((pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2), rest), -1)


@pytest.fixture
def angles() -> Tensor:
    """(positions, rotary_dim / 2) that are not in order, so that a wrong row shows."""
    return torch.randn(12, 3, dtype=torch.float64)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_turns_pairs_and_leaves_other_columns(angles: Tensor, interleaved: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 3, 8).to(dtype)
    before = x.clone()
    got = apply_rotary(x, angles.cos().to(dtype), angles.sin().to(dtype), interleaved=interleaved)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), _expected(x, angles[:7], interleaved), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert torch.equal(got[..., 6:], x[..., 6:])


def test_offsets_of_all_sequences_and_of_each(angles: Tensor) -> None:
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    torch.testing.assert_close(apply_rotary(x, cos, sin, 5), _expected(x, angles[5:12], False))
    each = torch.tensor([4, 1])
    expected = _expected(x, torch.stack([angles[4:11], angles[1:8]]), False)
    torch.testing.assert_close(apply_rotary(x, cos, sin, each), expected)


@pytest.mark.parametrize("each", [False, True])
def test_packed_sequences_begin_anew_and_rows_after_them_stay(angles: Tensor, each: bool) -> None:
    starts = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    x = torch.randn(11, 3, 8, dtype=torch.float64)
    offsets = torch.tensor([3, 0, 2]) if each else 1
    rows = torch.cat([angles[3:7], angles[2:7]] if each else [angles[1:5], angles[1:6]])
    got = apply_rotary(x, angles.cos(), angles.sin(), offsets, starts, 6)
    torch.testing.assert_close(got[:9], _expected(x[:9], rows, False))
    assert torch.equal(got[9:], x[9:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_and_back(angles: Tensor, interleaved: bool) -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64).transpose(1, 2)
    before, cos, sin = x.clone(), angles.cos(), angles.sin()
    assert apply_rotary(x, cos, sin, interleaved=interleaved, inplace=True) is x
    torch.testing.assert_close(x, _expected(before, angles[:7], interleaved))
    apply_rotary(x, cos, sin, interleaved=interleaved, inplace=True, conjugate=True)
    torch.testing.assert_close(x, before)


def test_gradients(angles: Tensor) -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = angles.cos(), angles.sin()
    assert torch.autograd.gradcheck(lambda x: rotary.apply_rotary_emb(x, cos, sin, interleaved=True), x)
    assert torch.autograd.gradcheck(lambda x: rotary.apply_rotary_emb(x * 2, cos, sin, inplace=True), x)


def test_qkv_and_kv_in_place(angles: Tensor) -> None:
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(2, 7, 3, 4, 8, dtype=torch.float64)
    before = qkv.clone()
    assert rotary.apply_rotary_emb_qkv_(qkv, cos, sin) is qkv
    torch.testing.assert_close(
        qkv[:, :, :2].flatten(2, 3), _expected(before[:, :, :2].flatten(2, 3), angles[:7], False)
    )
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])
    grouped = before.flatten(2, 3).clone()  # 4 heads of q, 4 of k, 4 of v
    torch.testing.assert_close(rotary.apply_rotary_emb_qkv_(grouped, cos, sin, num_heads_q=4), qkv.flatten(2, 3))
    kv = before[:, :, 1:].clone()
    torch.testing.assert_close(rotary.apply_rotary_emb_kv_(kv, cos, sin), qkv[:, :, 1:])


def test_the_module_is_the_paper() -> None:
    module = RotaryEmbedding(6, base=100.0)
    qkv = torch.randn(2, 7, 3, 4, 8)
    before = qkv.clone()
    angles = torch.outer(torch.arange(2.0, 9.0, dtype=torch.float64), 100.0 ** -(torch.arange(0, 6, 2) / 6).double())
    assert module(qkv, seqlen_offset=2) is qkv
    for part in (0, 1):
        torch.testing.assert_close(
            qkv[:, :, part].double(), _expected(before[:, :, part], angles, False), rtol=1e-4, atol=1e-5
        )
    q, kv = before[:, :, 0].clone(), before[:, :, 1:].clone()
    module(q, kv, seqlen_offset=torch.tensor([2, 2]), max_seqlen=9)
    torch.testing.assert_close(torch.cat((q[:, :, None], kv), 2), qkv)
    assert module.state_dict() == {}


def test_scaled_scores_depend_on_the_distance_alone() -> None:
    module = RotaryEmbedding(8, scale_base=4.0)
    row = torch.randn(3, 1, 8).expand(1, 9, 3, 1, 8).clone()
    qkv = module(row)
    scores = torch.einsum("qd,kd->qk", qkv[0, :, 0, 0], qkv[0, :, 1, 0])
    for distance in range(9):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-3, atol=1e-4)
    unscaled = RotaryEmbedding(8)(torch.randn(1, 9, 3, 1, 8))
    assert unscaled.shape == qkv.shape


def test_tables_are_exact_in_a_model_of_bf16_and_grow() -> None:
    module = RotaryEmbedding(8).bfloat16()
    module._update_cos_sin_cache(5, device="cpu", dtype=torch.float32)
    module._update_cos_sin_cache(1000, device="cpu", dtype=torch.float32)
    exact = torch.outer(torch.arange(1000, dtype=torch.float64), 10000.0 ** -(torch.arange(0, 8, 2) / 8).double()).cos()
    assert module._cos_cached is not None and module._cos_cached.shape == (1000, 4)
    torch.testing.assert_close(module._cos_cached.double(), exact, rtol=0, atol=1e-4)


def test_in_place_it_is_an_operation_of_torchs_to_autograd(angles: Tensor) -> None:
    cos, sin = angles.cos(), angles.sin()
    x, weight = torch.randn(2, 7, 3, 8, dtype=torch.float64), torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (x * weight).sum()
    apply_rotary(x, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_elements_may_be_negated_and_backwards_but_not_shared(angles: Tensor) -> None:
    cos, sin = angles.cos(), angles.sin()
    for x in (torch._neg_view(torch.randn(2, 7, 3, 8).double()), torch.randn(2, 8, 3, 16).double()[:, 1:, :, :8]):
        expected = apply_rotary(x.clone(), cos, sin)
        assert apply_rotary(x, cos, sin, inplace=True) is x
        torch.testing.assert_close(x, expected)
    for sizes in ((1, 7, 3, 8), (2, 1, 3, 8), (2, 7, 1, 8)):
        expanded = torch.randn(sizes, dtype=torch.float64).expand(2, 7, 3, 8)
        torch.testing.assert_close(apply_rotary(expanded, cos, sin), apply_rotary(expanded.clone(), cos, sin))
        with pytest.raises(RuntimeError, match="x must have elements of its own"):
            apply_rotary(expanded, cos, sin, inplace=True)


def test_heads_are_counted(angles: Tensor) -> None:
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(2, 7, 8, 8, dtype=torch.float64)
    before = qkv.clone()
    for num_heads_q in (-3, 0, 3, 7, 8):
        with pytest.raises(ValueError, match="num_heads_q must leave as many"):
            rotary.apply_rotary_emb_qkv_(qkv, cos, sin, num_heads_q=num_heads_q)
    with pytest.raises(ValueError, match=r"cos_k and sin_k must be|cos_k and sin must be"):
        rotary.apply_rotary_emb_qkv_(qkv, cos, sin, cos[:3], sin, num_heads_q=4)
    assert torch.equal(qkv, before)  # a refused call turns nothing


def test_what_does_not_fit_is_refused(angles: Tensor) -> None:
    cos, sin, x = angles.cos(), angles.sin(), torch.randn(2, 7, 3, 8)
    with pytest.raises(ValueError, match="have 12 positions, but 13 are needed"):
        apply_rotary(x, cos, sin, seqlen_offsets=6)
    with pytest.raises(ValueError, match="which turn 6 of x, but x has 4"):
        apply_rotary(x[..., :4], cos, sin)
    with pytest.raises(ValueError, match=r"x must be \(total, heads, head_dim\)"):
        apply_rotary(x, cos, sin, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32), max_seqlen=7)
    with pytest.raises(ValueError, match="max_seqlen is needed with cu_seqlens"):
        apply_rotary(x[0], cos, sin, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match="seqlen_offsets must be an int or"):
        apply_rotary(x, cos, sin, seqlen_offsets=torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="dim must be even"):
        RotaryEmbedding(7)
    for name in ("base", "scale_base"):
        with pytest.raises(ValueError, match=f"{name} must be positive, but is 0"):
            RotaryEmbedding(8, **{name: 0})
    with pytest.raises(ValueError, match="qkv must be"):
        rotary.apply_rotary_emb_qkv_(x, cos, sin)


def test_others_find_it_where_they_look() -> None:
    assert apply_rotary_elsewhere is apply_rotary
    assert Path(rotary.__file__).parent.name == "layers"
