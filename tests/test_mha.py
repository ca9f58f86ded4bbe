"""`FlashMHA` against the textbook's module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from flash_attn import FlashMHA, KVCache


class Textbook(nn.Module):
    """Multi-head attention as in any course: the whole score matrix, a mask of zeros and ones."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.d_k = num_heads, d_model // num_heads
        self.W_q, self.W_k = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.W_v, self.W_o = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            w(x).view(x.shape[0], -1, self.num_heads, self.d_k).transpose(1, 2)
            for w, x in ((self.W_q, q), (self.W_k, k), (self.W_v, v))
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return self.W_o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
def test_textbook_weights_load_and_give_the_same(causal: bool) -> None:
    textbook, ours = Textbook(32, 4), FlashMHA(32, 4, causal=causal)
    ours.load_state_dict(textbook.state_dict())
    x = torch.randn(2, 9, 32, requires_grad=True)
    mask = torch.ones(9, 9).tril() if causal else None
    expected, got = textbook(x, x, x, mask), ours(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_cross_attention_and_masks() -> None:
    textbook, ours = Textbook(32, 4), FlashMHA(32, 4)
    ours.load_state_dict(textbook.state_dict())
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    keep = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    expected = textbook(x, context, context, keep.view(2, 1, 1, 7))
    torch.testing.assert_close(ours(x, context, key_padding_mask=keep), expected)
    torch.testing.assert_close(ours(x, context, context, keep.view(2, 1, 1, 7)), expected)
    mask = torch.rand(5, 7) > 0.3
    mask[:, 0] = True
    expected = textbook(x, context, context, keep.view(2, 1, 1, 7) & mask)
    torch.testing.assert_close(ours(x, context, attn_mask=mask, key_padding_mask=keep), expected)
    bias = torch.zeros(5, 7).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(ours(x, context, attn_mask=bias, key_padding_mask=keep), expected)


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (6, 6)])
def test_a_causal_bias_goes_with_a_padding_mask(lengths: tuple[int, int]) -> None:
    ours = FlashMHA(32, 4)
    x, context = torch.randn(2, lengths[0], 32), torch.randn(2, lengths[1], 32)
    keep = torch.ones(2, lengths[1], dtype=torch.bool)
    keep[1, 3:] = False
    ones = torch.ones(lengths, dtype=torch.bool)
    for bias, mask in (
        (causal_upper_left(*lengths), ones.tril()),
        (causal_upper_left(20, 30), ones.tril()),
        (causal_lower_right(*lengths), ones.tril(lengths[1] - lengths[0])),
    ):
        torch.testing.assert_close(ours(x, context, attn_mask=bias), ours(x, context, attn_mask=mask))
        got, expected = (ours(x, context, attn_mask=m, key_padding_mask=keep) for m in (bias, mask))
        torch.testing.assert_close(got, expected)
        for masks in ({"key_padding_mask": keep}, {}):
            with pytest.raises(ValueError, match="causal must be False"):
                FlashMHA(32, 4, causal=True)(x, context, attn_mask=bias, **masks)
    with pytest.raises(RuntimeError, match="attn_mask must"):
        ours(x, context, attn_mask=causal_lower_right(3, 9), key_padding_mask=keep)
    with pytest.raises(RuntimeError, match="attn_mask must broadcast to"):
        ours(x, context, attn_mask=torch.randn(3, 1, 1, lengths[1]), key_padding_mask=keep)


def test_what_padding_holds_does_not_matter() -> None:
    ours = FlashMHA(32, 4)
    x = torch.randn(2, 7, 32)
    keep = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    other = torch.where(keep.unsqueeze(-1), x, torch.randn_like(x) * 100)
    torch.testing.assert_close(ours(other, key_padding_mask=keep)[keep], ours(x, key_padding_mask=keep)[keep])


def test_grouped_heads_bias_and_dtype() -> None:
    ours = FlashMHA(32, 4, num_heads_k=2, bias=False, dtype=torch.float64)
    assert ours.W_k.weight.shape == (16, 32) and ours.W_q.bias is None
    out = ours(torch.randn(2, 5, 32, dtype=torch.float64))
    assert out.shape == (2, 5, 32) and out.dtype == torch.float64


def test_dropout_follows_the_mode() -> None:
    ours = FlashMHA(32, 4, dropout=0.5)
    x = torch.randn(2, 9, 32)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_compiles_without_a_graph_break() -> None:
    ours = FlashMHA(32, 4, causal=True)
    x = torch.randn(2, 9, 32)
    keep = torch.rand(2, 9) > 0.3
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, key_padding_mask=keep), ours(x, key_padding_mask=keep))


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"d_model": 30, "num_heads": 4}, "num_heads must divide d_model"),
        ({"d_model": 32, "num_heads": 0}, "num_heads"),
        ({"d_model": 32, "num_heads": 4, "num_heads_k": 3}, "num_heads_k"),
        ({"d_model": 32, "num_heads": 4, "dropout": 1.5}, "dropout"),
    ],
)
def test_bad_sizes(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FlashMHA(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, values",
    [
        ("d_model", [32.0, True, "32", torch.tensor(32)]),
        ("num_heads", [4.0, True, None, torch.tensor(4)]),
        ("num_heads_k", [2.0, True, torch.tensor(2)]),
        ("dropout", [True, None, "0.1", nn.Parameter(torch.tensor(0.1)), torch.zeros(1)]),
        ("causal", [None, 2, torch.tensor(True), (-1, -1)]),
        ("bias", [None, 2, torch.tensor(True)]),
    ],
)
def test_arguments_of_other_types_are_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(TypeError, match=f"^{name} must be "):
            FlashMHA(**({"d_model": 32, "num_heads": 4} | {name: value}))
    assert FlashMHA(32, 4, dropout=1, causal=1).dropout == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    ours, x = FlashMHA(32, 4, num_heads_k=2), torch.randn(2, 5, 32, requires_grad=True)
    keep, bias = torch.rand(2, 5) > 0.3, torch.randn(5, 5)
    expected = ours(x, attn_mask=bias, key_padding_mask=keep)
    with torch.autocast("cpu", dtype):
        got = ours(x, attn_mask=bias, key_padding_mask=keep)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=3e-2, rtol=0)
    got.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_jagged_inputs() -> None:
    ours, parts = FlashMHA(32, 4, num_heads_k=2, causal=True), [torch.randn(3, 32), torch.randn(5, 32)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for got, part in zip(ours(nested).unbind(), parts, strict=True):
        torch.testing.assert_close(got, ours(part[None])[0])
    with pytest.raises(ValueError, match="key_padding_mask must be None for nested tensors"):
        ours(nested, key_padding_mask=torch.ones(2, 5, dtype=torch.bool))


def test_bad_inputs() -> None:
    ours = FlashMHA(32, 4)
    x = torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="query must be"):
        ours(x[0])
    with pytest.raises(ValueError, match="key must be"):
        ours(x, x[..., :16])
    with pytest.raises(TypeError, match="key_padding_mask must be bool"):
        ours(x, key_padding_mask=torch.ones(2, 5))
    with pytest.raises(TypeError, match="query must be a Tensor"):
        ours(None)
    with pytest.raises(TypeError, match="value must be a Tensor"):
        ours(x, x, x.detach().numpy())
    keep = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(TypeError, match="key_padding_mask must be a Tensor"):
        ours(x, key_padding_mask=keep.tolist())
    with pytest.raises(RuntimeError, match="key_padding_mask must be on key's device"):
        ours(x, key_padding_mask=keep.to("meta"))
    for masks in ({"key_padding_mask": keep}, {}):
        with pytest.raises(TypeError, match="attn_mask must be a Tensor"):
            ours(x, attn_mask=[[True]], **masks)
        with pytest.raises(RuntimeError, match="attn_mask must be bool"):
            ours(x, attn_mask=torch.ones(5, 5, dtype=torch.int64), **masks)
    with pytest.raises(ValueError, match="key_padding_mask must be"):
        ours(x, key_padding_mask=torch.ones(5, 2, dtype=torch.bool))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("page_size", [0, 16])
@torch.no_grad()
def test_a_cache_gives_what_the_whole_sequence_gives(device: str, page_size: int) -> None:
    mha = FlashMHA(32, 4, num_heads_k=2, causal=True, device=device)
    x = torch.randn(2, 40, 32, device=device)
    seqlens, table = torch.zeros(2, dtype=torch.int32, device=device), None
    shape = (2, 40, 2, 8)
    if page_size:
        table, shape = torch.tensor([[4, 0, 1], [2, 5, 3]], dtype=torch.int32, device=device), (6, page_size, 2, 8)
    cache = KVCache(
        torch.full(shape, math.nan, device=device), torch.full(shape, math.nan, device=device), seqlens, table
    )
    parts = []
    for piece in x.split([7, 1, 1, 20, 11], 1):
        parts.append(mha(piece, cache=cache))
        seqlens += piece.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), mha(x))


def test_a_cache_is_for_causal_self_attention() -> None:
    x = torch.randn(1, 4, 32)
    cache = KVCache(torch.zeros(1, 8, 4, 8), torch.zeros(1, 8, 4, 8), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="a cache is for causal attention without dropout, but causal is False"):
        FlashMHA(32, 4)(x, cache=cache)
    with pytest.raises(ValueError, match=r"and dropout 0\.5"):
        FlashMHA(32, 4, causal=True, dropout=0.5)(x, cache=cache)
    with pytest.raises(ValueError, match="key, value and masks must be None with a cache"):
        FlashMHA(32, 4, causal=True)(x, x, cache=cache)
    with pytest.raises(ValueError, match="query must be"):
        FlashMHA(32, 4, causal=True)(x[0], cache=cache)
