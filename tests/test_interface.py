"""`flash_attn_func` and `flash_attn_varlen_func`."""

from __future__ import annotations

import inspect

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention

COMMON = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}


def test_names_order_and_defaults() -> None:
    def positional(function: object) -> dict[str, object]:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

    empty = inspect.Parameter.empty
    assert list(positional(flash_attn_func).items()) == [("q", empty), ("k", empty), ("v", empty), *COMMON.items()]
    lengths = [(n, empty) for n in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    assert list(positional(flash_attn_varlen_func).items()) == [
        ("q", empty),
        ("k", empty),
        ("v", empty),
        *lengths,
        *COMMON.items(),
        ("block_table", None),
    ]


def test_causal_is_aligned_at_the_bottom_right_and_windows_are_inclusive() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 9, 3, 8)
    i, j = torch.arange(4).view(-1, 1) + 5, torch.arange(9)

    def expected(mask: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)), mask).transpose(1, 2)

    torch.testing.assert_close(flash_attn_func(q, k, k, causal=True), expected(j <= i))
    torch.testing.assert_close(flash_attn_func(q, k, k, window_size=(2, 1)), expected((j >= i - 2) & (j <= i + 1)))
    torch.testing.assert_close(
        flash_attn_func(q, k, k, causal=True, window_size=(2, 5)), expected((j >= i - 2) & (j <= i))
    )


def test_what_is_returned() -> None:
    q = torch.randn(2, 4, 3, 8)
    out, lse = flash_attn_func(q, q, q, return_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 3, 4) and lse.dtype == torch.float32
    out, lse, probabilities = flash_attn_func(q, q, q, return_attn_probs=True)
    assert probabilities is None
    scores = torch.einsum("bihd,bjhd->bhij", q, q) / 8**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_packed_sequences_equal_single_ones(as_tensor: bool) -> None:
    lengths = [5, 0, 12, 1]
    starts = torch.tensor([0, 5, 5, 17, 18], dtype=torch.int32)
    q, k, v = (torch.randn(18, h, 8, requires_grad=True) for h in (4, 2, 2))
    longest = torch.tensor(12) if as_tensor else 12
    out, lse = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True, return_lse=True)
    assert lse.shape == (4, 18)
    parts = [
        flash_attn_func(*(x.unsqueeze(0) for x in p), causal=True)[0]
        for p in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(parts))
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), weight)
    torch.testing.assert_close(got, torch.autograd.grad(torch.cat(parts), (q, k, v), weight))


def test_slopes_and_sinks_of_16_bit_parameters_get_gradients() -> None:
    q = torch.randn(2, 4, 3, 8).bfloat16()
    slopes, sink = torch.rand(3, requires_grad=True), torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    out = flash_attn_func(q, q, q, alibi_slopes=slopes, learnable_sink=sink)
    for x, gradient in zip((slopes, sink), torch.autograd.grad(out.sum(), (slopes, sink)), strict=True):
        assert gradient.dtype == x.dtype and gradient.abs().sum() > 0
    torch.testing.assert_close(out, flash_attn_func(q, q, q, alibi_slopes=slopes, s_aux=sink))


def test_refusals() -> None:
    q = torch.randn(2, 4, 3, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="window_size"):
        flash_attn_func(q, q, q, window_size=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="s_aux"):
        flash_attn_func(q, q, q, learnable_sink=torch.zeros(3), s_aux=torch.zeros(3))
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_varlen_func(q[0], q[0], q[0], starts, starts, 4, 4, block_table=torch.zeros(1, 1))
