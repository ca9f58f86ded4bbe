"""The modules of `flash_attn.modules.mha` do what the functions do."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.modules.mha import FlashCrossAttention, FlashSelfAttention, get_alibi_slopes

STARTS = torch.tensor([0, 3, 10], dtype=torch.int32)
STARTS_K = torch.tensor([0, 5, 13], dtype=torch.int32)


def test_slopes_are_those_of_the_paper() -> None:
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(1) == [2.0**-8]
    torch.testing.assert_close(get_alibi_slopes(16), [2.0 ** (-i / 2) for i in range(1, 17)])
    torch.testing.assert_close(
        get_alibi_slopes(12), [2.0**-i for i in range(1, 9)] + [2.0 ** (0.5 - i) for i in (1, 2, 3, 4)]
    )
    for heads in range(1, 40):
        slopes = get_alibi_slopes(heads)
        assert len(set(slopes)) == heads and all(0 < slope < 1 for slope in slopes)
    with pytest.raises(ValueError, match="nheads must be positive, but is 0"):
        get_alibi_slopes(0)


def _names(function: object) -> dict[str, object]:
    return {x.name: x.default for x in inspect.signature(function).parameters.values()}  # type: ignore[arg-type]


def test_names_order_and_defaults() -> None:
    empty = inspect.Parameter.empty
    options = {"causal": False, "softmax_scale": None, "attention_dropout": 0.0}
    window, slopes, last = {"window_size": (-1, -1)}, {"alibi_slopes": None}, {"deterministic": False}
    assert list(_names(FlashSelfAttention).items()) == list((options | window | slopes | last).items())
    assert list(_names(FlashCrossAttention).items()) == list((options | slopes | window | last).items())
    self_attention = {"self": empty, "qkv": empty, "causal": None, "cu_seqlens": None, "max_seqlen": None}
    assert list(_names(FlashSelfAttention.forward).items()) == list(self_attention.items())
    lengths = dict.fromkeys(("causal", "cu_seqlens", "max_seqlen", "cu_seqlens_k", "max_seqlen_k"))
    cross = {"self": empty, "q": empty, "kv": empty} | lengths
    assert list(_names(FlashCrossAttention.forward).items()) == list(cross.items())


def test_self_attention_passes_its_options_on() -> None:
    slopes = torch.tensor(get_alibi_slopes(4))
    options = {"softmax_scale": 0.3, "window_size": (4, 0), "alibi_slopes": slopes}
    module = FlashSelfAttention(causal=True, deterministic=True, **options)
    qkv, packed = torch.randn(2, 7, 3, 4, 8), torch.randn(10, 3, 4, 8)
    assert torch.equal(module(qkv), flash_attn_func(*qkv.unbind(2), causal=True, **options))
    assert torch.equal(module(qkv, causal=False), flash_attn_func(*qkv.unbind(2), causal=False, **options))
    expected = flash_attn_varlen_func(*packed.unbind(1), STARTS, STARTS, 7, 7, causal=True, **options)
    assert torch.equal(module(packed, cu_seqlens=STARTS, max_seqlen=7), expected)
    assert torch.equal(module(packed, cu_seqlens=STARTS, max_seqlen=torch.tensor(7)), expected)


def test_cross_attention_passes_its_options_on() -> None:
    options = {"softmax_scale": 0.3, "window_size": (4, 1), "alibi_slopes": torch.rand(4)}
    module = FlashCrossAttention(**options)
    q, kv = torch.randn(2, 7, 4, 8), torch.randn(2, 9, 2, 2, 8)
    assert torch.equal(module(q, kv), flash_attn_func(q, *kv.unbind(2), **options))
    assert torch.equal(module(q, kv, causal=True), flash_attn_func(q, *kv.unbind(2), causal=True, **options))
    q, kv = torch.randn(10, 4, 8), torch.randn(13, 2, 2, 8)
    expected = flash_attn_varlen_func(q, *kv.unbind(1), STARTS, STARTS_K, 7, 8, **options)
    assert torch.equal(module(q, kv, None, STARTS, 7, STARTS_K, 8), expected)


def test_dropout_is_for_training() -> None:
    module, cross = FlashSelfAttention(attention_dropout=0.5), FlashCrossAttention(attention_dropout=0.5)
    qkv = torch.randn(2, 7, 3, 4, 8)
    for run in (lambda: module(qkv), lambda: cross(qkv[:, :, 0], qkv[:, :, 1:])):
        torch.manual_seed(0)
        dropped = run()
        torch.manual_seed(0)
        assert torch.equal(dropped, flash_attn_func(*qkv.unbind(2), dropout_p=0.5))
        assert not torch.equal(run(), dropped)
        module.eval(), cross.eval()
        assert torch.equal(run(), flash_attn_func(*qkv.unbind(2)))
        module.train(), cross.train()


def test_it_has_no_state_and_moves_and_copies() -> None:
    module = FlashSelfAttention(alibi_slopes=torch.rand(4))
    assert not module.state_dict() and not list(module.parameters())
    assert copy.deepcopy(module).to(torch.float64)(torch.randn(1, 3, 3, 4, 8).double()).dtype == torch.float64
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    qkv = torch.randn(2, 7, 3, 4, 8)
    assert torch.equal(compiled(qkv), module(qkv))


def test_lengths_that_lack_their_partners_are_refused() -> None:
    qkv = torch.randn(10, 3, 4, 8)
    with pytest.raises(ValueError, match="max_seqlen must be given with cu_seqlens"):
        FlashSelfAttention()(qkv, cu_seqlens=STARTS)
    cross = FlashCrossAttention()
    q, kv = qkv[:, 0], qkv[:, 1:]
    for given, text in (
        ({"cu_seqlens": STARTS, "max_seqlen": 7}, "cu_seqlens_k must be given with cu_seqlens"),
        ({"cu_seqlens_k": STARTS, "max_seqlen_k": 7}, "cu_seqlens must be given with cu_seqlens_k"),
        ({"cu_seqlens": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_k": 7}, "max_seqlen must be given"),
        ({"cu_seqlens": STARTS, "cu_seqlens_k": STARTS, "max_seqlen": 7}, "max_seqlen_k must be given"),
    ):
        with pytest.raises(ValueError, match=text):
            cross(q, kv, **given)


@pytest.mark.parametrize("name", ["MHA", "SelfAttention", "CrossAttention"])
def test_modules_that_are_not_here_say_what_to_use(name: str) -> None:
    with pytest.raises(ImportError, match=r"FlashMHA|FlashSelfAttention|FlashCrossAttention"):
        exec(f"from flash_attn.modules.mha import {name}")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from flash_attn.modules.mha import nothing")
