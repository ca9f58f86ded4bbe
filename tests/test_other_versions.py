"""Arguments of FlashAttention 3 and 4: taken where they map to what is here or are hints, else refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.functions.other_versions import _MISSING

STARTS = torch.tensor([0, 4, 9], dtype=torch.int32)


def _batched(q: Tensor, **options: Any) -> Any:
    return flash_attn_func(q[None], q[None], q[None], **options)


def _packed(q: Tensor, **options: Any) -> Any:
    return flash_attn_varlen_func(q, q, q, STARTS, STARTS, 5, 5, **options)


FUNCTIONS = [_batched, _packed]

# Keyword arguments of FA3's functions and of FA4's, beside those that 2.8 has.
FA3 = {"qv", "q_descale", "k_descale", "v_descale", "attention_chunk", "num_splits", "pack_gqa", "sm_margin"}
FA4 = {"qv", "gather_kv_indices", "learnable_sink", "num_splits", "pack_gqa", "score_mod", "score_mod_bwd", "mask_mod"}
FA4 |= {"aux_tensors", "aux_scalars", "block_sparse_tensors", "block_sparse_tensors_bwd", "return_lse"}
VARLEN = {"seqused_q", "seqused_k", "page_table", "min_seqlen_k", "scheduler_metadata", "seqlen_k_per_split"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_hints_change_nothing_and_are_checked(function: Callable[..., Any]) -> None:
    q = torch.randn(9, 3, 8)
    expected = function(q, causal=True)
    for hints in ({"num_splits": 0}, {"num_splits": 1}, {"num_splits": 32, "pack_gqa": True}, {"pack_gqa": False}):
        assert torch.equal(function(q, causal=True, **hints), expected)
    for error, text, hints in (
        (ValueError, "num_splits must be >= 0, but is -1", {"num_splits": -1}),
        (TypeError, "num_splits must be an int, but is 1.0", {"num_splits": 1.0}),
        (TypeError, "num_splits must be an int, but is True", {"num_splits": True}),
        (TypeError, "pack_gqa must be a bool, but is 'yes'", {"pack_gqa": "yes"}),
    ):
        with pytest.raises(error, match=text):
            function(q, **hints)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", sorted(_MISSING))
def test_what_is_not_supported_is_taken_only_turned_off(name: str, function: Callable[..., Any]) -> None:
    q = torch.randn(9, 3, 8)
    off, instead = _MISSING[name]
    assert torch.equal(function(q, **{name: off}), function(q))
    for value in (128, torch.ones(9, 3), lambda *scores: scores[0]):
        with pytest.raises(NotImplementedError, match=f"^{name} must be {off} or left out") as error:
            function(q, **{name: value})
        assert instead in str(error.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_argument_of_theirs_is_known_and_no_other(function: Callable[..., Any]) -> None:
    ours = flash_attn_func if function is _batched else flash_attn_varlen_func
    parameters = inspect.signature(ours).parameters
    known = set(parameters) | set(_MISSING)
    assert FA3 | FA4 | (VARLEN if function is _packed else set()) <= known
    assert not set(parameters) & set(_MISSING)  # who asks the signature is told what works
    with pytest.raises(TypeError, match=rf"{ours.__name__}\(\) got an unexpected keyword argument 'windows'"):
        function(torch.randn(9, 3, 8), windows=None)


def test_scores_of_qv_are_those_of_longer_heads() -> None:
    """What the refusal of qv says to do."""
    q, k = torch.randn(1, 5, 2, 4, dtype=torch.float64), torch.randn(1, 6, 2, 4, dtype=torch.float64)
    qv, v = torch.randn(1, 5, 2, 12, dtype=torch.float64), torch.randn(1, 6, 2, 12, dtype=torch.float64)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) + torch.einsum("bihd,bjhd->bhij", qv, v)
    expected = torch.einsum("bhij,bjhd->bihd", (scores / 16**0.5).softmax(-1), v)
    torch.testing.assert_close(flash_attn_func(torch.cat((q, qv), -1), torch.cat((k, v), -1), v), expected)


def test_options_of_fa3_by_position_are_not_taken_for_others() -> None:
    """Its fourth and fifth arguments are softmax_scale and causal, where 2.8 has dropout_p and softmax_scale."""
    q = torch.randn(1, 9, 3, 8)
    with pytest.raises(TypeError, match="softmax_scale must be a number, but is True"):
        flash_attn_func(q, q, q, 0.3, True)


def test_they_compile() -> None:
    def run(q: Tensor) -> Tensor:
        return _batched(q, num_splits=4, pack_gqa=True, qv=None, sm_margin=0)

    q = torch.randn(9, 3, 8)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))
