"""NaN, infinities and rows that see nothing: where they go, and where they must not."""

from __future__ import annotations

import pytest
import torch

from flash_attn import flash_attn_func
from flash_attn import scaled_dot_product_attention as sdpa

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _inputs(device: str, dtype: torch.dtype, length: int = 70) -> list[torch.Tensor]:
    return [torch.randn(1, 2, length, 32, dtype=dtype, device=device).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_sees_nothing_gives_zeros_and_zero_gradients(kind: str, dtype: torch.dtype, device: str) -> None:
    q, k, v = _inputs(device, dtype)
    mask = torch.rand(70, 70, device=device) > 0.3
    mask[5] = False
    mask[66:] = False
    attn_mask = (
        mask if kind == "bool" else torch.zeros(70, 70, device=device).masked_fill(~mask, float("-inf")).to(dtype)
    )
    out = sdpa(q, k, v, attn_mask)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out[..., 5, :], torch.zeros_like(out[..., 5, :]))
    assert torch.equal(out[..., 66:, :], torch.zeros_like(out[..., 66:, :]))
    assert torch.equal(gradients[0][..., 5, :], torch.zeros_like(out[..., 5, :]))
    assert all(torch.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_masked_key_holds_does_not_leak(bad: float, dtype: torch.dtype, device: str) -> None:
    q, k, v = _inputs(device, dtype)
    keep = torch.ones(70, dtype=torch.bool, device=device)
    keep[[3, 64, 69]] = False
    with torch.no_grad():
        k[..., ~keep, :] = bad
        v[..., ~keep, :] = bad
    out = sdpa(q, k, v, keep.view(1, -1))
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    expected = sdpa(q.detach(), k.detach()[..., keep, :], v.detach()[..., keep, :])
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert all(torch.isfinite(x).all() for x in (out, *gradients))
    assert torch.equal(gradients[2][..., ~keep, :], torch.zeros_like(gradients[2][..., ~keep, :]))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("side", ["causal", "window"])
def test_keys_that_no_query_of_a_block_sees_may_be_nan(
    side: str, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 queries, so that what they see ends inside sixteen keys, and keys beyond have a NaN."""
    monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
    q, k, v = (torch.randn(1, 2, n, head_dim, dtype=torch.bfloat16, device="cuda") for n in (70, 200, 200))
    unseen = torch.arange(200, device="cuda") >= 70 if side == "causal" else torch.arange(200, device="cuda") < 123
    k[..., unseen, :] = v[..., unseen, :] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    if side == "causal":
        out = sdpa(q, k, v, is_causal=True)
    else:
        tensors = (x.transpose(1, 2) for x in (q, k, v))
        out = flash_attn_func(*tensors, window_size=(7, 5)).transpose(1, 2)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *gradients))
    assert all(torch.equal(x[..., unseen, :], torch.zeros_like(x[..., unseen, :])) for x in gradients[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("size", [150, 152])  # of 152 biases a row consists of 16-byte pieces
@pytest.mark.parametrize("kind", ["bool", "shared bias", "bias"])
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_a_key_that_a_mask_shows_to_rows_before_it_alone_may_be_nan(
    family: str, kind: str, size: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a causal mask nobody sees it, though the mask, looked at alone, shows it to a row of the same tile: of the
    last one to a row that is read in the place of those that do not exist."""
    if family == "sm90" and (head_dim > 256 or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("not a problem of the Hopper family")
    monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    q, k, v = (torch.randn(8, 1, size, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    unseen = torch.zeros(size, dtype=torch.bool, device="cuda")
    unseen[[7, 40, 101, 147]] = True
    k[..., unseen, :] = v[..., unseen, :] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    seen = torch.ones(1 if kind == "shared bias" else 8, 1, size, size, dtype=torch.bool, device="cuda")
    seen[..., unseen] = False
    for key, row in ((7, 3), (40, 20), (101, 99), (147, 144)):
        seen[:, :, row, key] = True
    attn_mask = seen if kind == "bool" else torch.where(seen, 1.0, -torch.inf).to(torch.bfloat16)
    out = sdpa(q, k, v, attn_mask, is_causal=True)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *gradients))
    assert all(torch.equal(x[..., unseen, :], torch.zeros_like(x[..., unseen, :])) for x in gradients[1:])
    expected = sdpa(q.detach(), k.detach().nan_to_num(), v.detach().nan_to_num(), attn_mask, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_nan_that_is_attended_to_is_seen(where: str, dtype: torch.dtype, device: str) -> None:
    inputs = dict(zip("qkv", _inputs(device, dtype), strict=True))
    with torch.no_grad():
        inputs[where][0, 0, 20, 4] = float("nan")
    out = sdpa(inputs["q"], inputs["k"], inputs["v"], is_causal=True)
    assert torch.isfinite(out[0, 1]).all()
    if where == "v":  # 0 * NaN: rows that do not see key 20 may have it in their tile
        assert torch.isnan(out[0, 0, 20:, 4]).all()
        assert torch.isfinite(out[0, 0, :, :4]).all() and torch.isfinite(out[0, 0, :, 5:]).all()
    else:
        assert torch.isfinite(out[0, 0, :20]).all()
        assert torch.isnan(out[0, 0, 20]).all()
        later = out[0, 0, 21:]
        assert torch.isnan(later).all() if where == "k" else torch.isfinite(later).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_the_smallest_number_is_finite_and_averages(dtype: torch.dtype, device: str) -> None:
    q, k, v = (x.detach() for x in _inputs(device, dtype, 9))
    q = torch.zeros_like(q)
    mask = torch.full((9, 9), torch.finfo(dtype).min, dtype=dtype, device=device)
    out = sdpa(q, k, v, mask)
    torch.testing.assert_close(out, v.double().mean(-2, keepdim=True).expand_as(v).to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_keys_that_no_row_of_a_tile_sees_do_not_leak_into_it(kind: str, head_dim: int) -> None:
    """Documents of whole tiles, of 128 rows and of 192, and keys that nobody sees in the middle of one."""
    q, k, v = (torch.randn(1, 2, 1152, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    document = torch.arange(1152, device="cuda") // 384
    mask = document[:, None] == document
    mask[:, 100:230] = False
    attn_mask = mask if kind == "bool" else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    expected = sdpa(q, k, v, attn_mask)
    for x in (k, v):
        x[..., 100:230, :] = float("nan")
        x[..., 768:, :] = float("nan")
    assert torch.equal(sdpa(q, k, v, attn_mask)[..., :768, :], expected[..., :768, :])
