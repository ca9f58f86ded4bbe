"""Every argument of every public function, wrong in many ways: the refusal names an argument of that function."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import flash_attn
from flash_attn import bert_padding, flash_attn_with_kvcache
from flash_attn.layers import rotary
from flash_attn.modules import mha

R = torch.randn
_ROWS = (2, 5, 4, 16)


def _starts(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def _packed_queries(rows: int) -> dict[str, Any]:
    starts = {"cu_seqlens_q": _starts(0, rows // 2, rows), "cu_seqlens_k": _starts(0, 5, 10)}
    return {"q": R(rows, 4, 16), **starts, "max_seqlen_q": 5, "max_seqlen_k": 5}


def _pages() -> list[torch.Tensor]:
    return [R(6, 16, 4, 16), R(6, 16, 4, 16)]


_TABLE = torch.arange(6, dtype=torch.int32).view(2, 3)
_PADDED = {"hidden_states": R(2, 5, 3)}
_TABLES = {"cos": R(20, 8), "sin": R(20, 8)}
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "sdpa": (
        flash_attn.scaled_dot_product_attention,
        lambda: dict(zip(("query", "key", "value"), R(3, *_ROWS), strict=True)) | {"attn_mask": torch.ones(4, 4) > 0},
    ),
    "func": (flash_attn.flash_attn_func, lambda: dict(zip("qkv", R(3, *_ROWS), strict=True))),
    "qkvpacked": (flash_attn.flash_attn_qkvpacked_func, lambda: {"qkv": R(2, 5, 3, 4, 16)}),
    "kvpacked": (flash_attn.flash_attn_kvpacked_func, lambda: {"q": R(_ROWS), "kv": R(2, 7, 2, 4, 16)}),
    "varlen": (
        flash_attn.flash_attn_varlen_func,
        lambda: _packed_queries(10) | dict(zip("kv", R(2, 10, 4, 16), strict=True)),
    ),
    "varlen in pages": (
        flash_attn.flash_attn_varlen_func,
        lambda: _packed_queries(4) | dict(zip("kv", _pages(), strict=True)) | {"block_table": _TABLE},
    ),
    "varlen qkvpacked": (
        flash_attn.flash_attn_varlen_qkvpacked_func,
        lambda: {"qkv": R(10, 3, 4, 16), "cu_seqlens": _starts(0, 5, 10), "max_seqlen": 5},
    ),
    "varlen kvpacked": (
        flash_attn.flash_attn_varlen_kvpacked_func,
        lambda: _packed_queries(10) | {"kv": R(10, 2, 4, 16)},
    ),
    "cache": (
        flash_attn_with_kvcache,
        lambda: {
            **dict(zip(("q", "k", "v"), R(3, 2, 1, 4, 16), strict=True)),
            **dict(zip(("k_cache", "v_cache"), R(2, 2, 20, 4, 16), strict=True)),
            **{f"rotary_{name}": x for name, x in _TABLES.items()},
            "cache_seqlens": _starts(3, 4),
        },
    ),
    "pages": (
        flash_attn_with_kvcache,
        lambda: {
            **dict(zip(("q", "k_cache", "v_cache"), (R(2, 1, 4, 16), *_pages()), strict=True)),
            "cache_seqlens": _starts(3, 4),
            "page_table": _TABLE,
        },
    ),
    "prepare_mask": (flash_attn.prepare_mask, lambda: {"mask": torch.ones(2, 1, 5, 7) > 0}),
    "prepare_mask of lengths": (flash_attn.prepare_mask, lambda: {"lengths": [3, 4]}),
    "index": (bert_padding.index_first_axis, lambda: {"input": R(90, 3), "indices": torch.tensor([1, 2])}),
    "unpad": (
        bert_padding.unpad_input,
        lambda: _PADDED | {"attention_mask": torch.ones(2, 5), "unused_mask": torch.zeros(2, 5)},
    ),
    "unpad sequences": (
        bert_padding.unpad_input_for_concatenated_sequences,
        lambda: _PADDED | {"attention_mask_in_length": torch.tensor([[2, 1, 0, 0, 0], [5, 0, 0, 0, 0]])},
    ),
    "pad": (
        bert_padding.pad_input,
        lambda: {"hidden_states": R(2, 3), "indices": torch.tensor([0, 1]), "batch": 2, "seqlen": 50},
    ),
    "rotary": (rotary.apply_rotary_emb, lambda: {"x": R(_ROWS), **_TABLES}),
    "rotary qkv": (rotary.apply_rotary_emb_qkv_, lambda: {"qkv": R(2, 5, 3, 4, 16), **_TABLES}),
    "rotary heads": (rotary.apply_rotary_emb_qkv_, lambda: {"qkv": R(2, 5, 8, 16), **_TABLES, "num_heads_q": 4}),
    "rotary kv": (rotary.apply_rotary_emb_kv_, lambda: {"kv": R(2, 5, 2, 4, 16), **_TABLES}),
    "RotaryEmbedding": (rotary.RotaryEmbedding, lambda: {"dim": 16}),
    "its forward": (rotary.RotaryEmbedding(16).forward, lambda: {"qkv": R(2, 5, 3, 4, 16)}),
    "FlashMHA": (flash_attn.FlashMHA, lambda: {"d_model": 64, "num_heads": 4}),
    "its forward pass": (flash_attn.FlashMHA(64, 4).forward, lambda: {"query": R(2, 5, 64)}),
    "FlashSelfAttention": (mha.FlashSelfAttention().forward, lambda: {"qkv": R(2, 5, 3, 4, 16)}),
    "FlashCrossAttention": (mha.FlashCrossAttention().forward, lambda: {"q": R(_ROWS), "kv": R(2, 7, 2, 4, 16)}),
    "slopes": (mha.get_alibi_slopes, lambda: {"nheads": 4}),
    "explain": (flash_attn.explain, lambda: {"function": lambda: None}),
}
WRONG: list[Any] = [
    *(None, -3, 7, 1.5, float("nan"), True, "x", [1, 2], object(), np.ones(3)),
    *(torch.tensor(1.5), torch.tensor(3), torch.ones(3), _starts(3, 4), _starts(30, 40), torch.empty(0)),
    *(R(_ROWS), R(_ROWS).double(), R(_ROWS).int(), R(_ROWS).to(torch.complex64), torch.empty(_ROWS, device="meta")),
    torch.eye(5).to_sparse(),
]
_IGNORED = {"device", "input"}  # torch's own to name: of `input` an index may be too large


@pytest.mark.parametrize("name", CALLS)
def test_a_refusal_names_an_argument(name: str) -> None:
    function, make = CALLS[name]
    function(**make())
    parameters = [p.name for p in inspect.signature(function).parameters.values() if p.kind not in (2, 4)]
    names = re.compile(r"\b(" + "|".join(parameters) + r")\b")
    for parameter in set(parameters) - _IGNORED:
        for wrong in WRONG:
            if name == "explain" and isinstance(wrong, torch.Tensor):
                continue  # the query of a call that has a name for each of its own
            if isinstance(wrong, torch.Tensor) and wrong.is_meta and parameter == "hidden_states":
                continue  # which torch's own ops take
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(**make() | {parameter: wrong})
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                assert names.search(str(error)), f"{parameter}={wrong!r}: {error!r}"
                assert "argument 'size'" not in str(error) and "Expected a value of type" not in str(error)


@pytest.mark.parametrize("name", ["cache", "pages", "varlen in pages", "rotary", "rotary qkv", "rotary kv"])
def test_a_tensor_without_data_is_not_computed_with(name: str) -> None:
    function, make = CALLS[name]
    given = make()
    tensors = [parameter for parameter, x in given.items() if isinstance(x, torch.Tensor)]
    for parameter in tensors:
        with pytest.raises(RuntimeError, match="device"):
            function(**given | {parameter: given[parameter].to("meta")})
    function(**{n: x.to("meta") if n in tensors else x for n, x in given.items()})
