"""Every name of flash_attn 2.8 that is here is imported from where its users do, and called with all its arguments by
position, as 2.8 orders them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

B, S, H, H_K, D = 2, 7, 4, 2, 8
STARTS = torch.tensor([0, 3, 10], dtype=torch.int32)
SLOPES = torch.rand(H)
# dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
OPTIONS: tuple[Any, ...] = (0.0, 0.3, True, (3, 0), 2.0, SLOPES, True, False)
# of the steps: dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
STEP: tuple[Any, ...] = (0.0, 0.3, True, 3, 0, 2.0, SLOPES)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _qkv(*lead: int) -> list[Tensor]:
    return [_x(*lead, H, D), _x(*lead, H_K, D), _x(*lead, H_K, D)]


def _interface(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("flash_attn.flash_attn_interface"), name)  # type: ignore[no-any-return]


def _backward() -> tuple[Any, ...]:
    qkv = _qkv(B, S)
    out, lse, _, rng_state = _interface("_flash_attn_forward")(*qkv, *STEP, False)
    return (_x(B, S, H, D), *qkv, out, lse, *map(torch.empty_like, qkv), *STEP, True, rng_state)


def _varlen_backward() -> tuple[Any, ...]:
    qkv, lengths = _qkv(10), (STARTS, STARTS, 7, 7)
    out, lse, _, rng_state = _interface("_flash_attn_varlen_forward")(*qkv, *lengths, *STEP)
    gradients = map(torch.empty_like, qkv)
    return (_x(10, H, D), *qkv, out, lse, *gradients, *lengths, *STEP, True, rng_state, False)


def _kvcache() -> tuple[Any, ...]:
    q, k, v = _qkv(B, 1)
    cos, sin = _x(16, D // 2).cos(), _x(16, D // 2).sin()
    used = torch.tensor([3, 5], dtype=torch.int32)
    entries, padding = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    cache = _x(3, 16, H_K, D), _x(3, 16, H_K, D)
    lengths = used, entries, padding, None  # cache_seqlens, cache_batch_idx, cache_leftpad, block_table
    return (q, *cache, k, v, cos, sin, *lengths, 0.3, True, (3, 0), 2.0, False, SLOPES, 1, True)


MASK = torch.arange(S) < torch.tensor([[7], [4]])
TABLES = (_x(S, D // 2).cos(), _x(S, D // 2).sin())
INTERFACE, PADDING, ROTARY = "flash_attn.flash_attn_interface", "flash_attn.bert_padding", "flash_attn.layers.rotary"

# Where it is imported from, its name, its arguments, and the shapes of its results.
CALLS: list[tuple[str, str, Callable[[], tuple[Any, ...]], list[tuple[int, ...]]]] = [
    (module, name, arguments, shapes)
    for name, arguments, shapes in [
        ("flash_attn_func", lambda: (*_qkv(B, S), *OPTIONS), [(B, S, H, D)]),
        ("flash_attn_qkvpacked_func", lambda: (_x(B, S, 3, H, D), *OPTIONS), [(B, S, H, D)]),
        ("flash_attn_kvpacked_func", lambda: (_x(B, S, H, D), _x(B, S, 2, H_K, D), *OPTIONS), [(B, S, H, D)]),
        ("flash_attn_varlen_func", lambda: (*_qkv(10), STARTS, STARTS, 7, 7, *OPTIONS, None), [(10, H, D)]),
        ("flash_attn_varlen_qkvpacked_func", lambda: (_x(10, 3, H, D), STARTS, 7, *OPTIONS), [(10, H, D)]),
        (
            "flash_attn_varlen_kvpacked_func",
            lambda: (_x(10, H, D), _x(10, 2, H_K, D), STARTS, STARTS, 7, 7, *OPTIONS),
            [(10, H, D)],
        ),
        ("flash_attn_with_kvcache", _kvcache, [(B, 1, H, D), (B, H, 1)]),
    ]
    for module in ("flash_attn", INTERFACE)
]
CALLS += [
    (INTERFACE, "_flash_attn_forward", lambda: (*_qkv(B, S), *STEP, False), [(B, S, H, D), (B, H, S)]),
    (
        INTERFACE,
        "_flash_attn_varlen_forward",
        lambda: (*_qkv(10), STARTS, STARTS, 7, 7, *STEP, False, None, None, STARTS.diff().int(), False, 0),
        [(10, H, D), (H, 10)],
    ),
    (INTERFACE, "_flash_attn_backward", _backward, []),
    (INTERFACE, "_flash_attn_varlen_backward", _varlen_backward, []),
    (PADDING, "unpad_input", lambda: (_x(B, S, D), MASK, None), [(11, D), (11,), (B + 1,)]),
    (
        PADDING,
        "unpad_input_for_concatenated_sequences",
        lambda: (_x(B, S, D), torch.tensor([[2, 3, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0]])),
        [(12, D), (12,), (4,)],
    ),
    (PADDING, "pad_input", lambda: (_x(11, D), MASK.flatten().nonzero().flatten(), B, S), [(B, S, D)]),
    (PADDING, "index_first_axis", lambda: (_x(B * S, D), torch.tensor([3, 1])), [(2, D)]),
    (PADDING, "index_put_first_axis", lambda: (_x(2, D), torch.tensor([3, 1]), B * S), [(B * S, D)]),
    (PADDING, "index_first_axis_residual", lambda: (_x(B * S, D), torch.tensor([3, 1])), [(2, D), (B * S, D)]),
    (ROTARY, "apply_rotary_emb", lambda: (_x(B, S, H, D), *TABLES, True, False, 0, None, None), [(B, S, H, D)]),
    (ROTARY, "apply_rotary_emb_func", lambda: (_x(B, S, H, D), *TABLES, True, False, 0, None, None), [(B, S, H, D)]),
    (ROTARY, "apply_rotary_emb_torch", lambda: (_x(B, S, H, D), *TABLES, True), [(B, S, H, D)]),
    (
        ROTARY,
        "apply_rotary_emb_qkv_",
        lambda: (_x(B, S, 3, H, D), *TABLES, None, None, True, 0, None),
        [(B, S, 3, H, D)],
    ),
    (ROTARY, "apply_rotary_emb_kv_", lambda: (_x(B, S, 2, H, D), *TABLES, True, 0), [(B, S, 2, H, D)]),
    (
        "flash_attn.ops.triton.rotary",
        "apply_rotary",
        lambda: (_x(B, S, H, D), *TABLES, 0, None, None, True, False, True),
        [(B, S, H, D)],
    ),
]


@pytest.mark.parametrize(("module", "name", "arguments", "shapes"), CALLS, ids=lambda x: x if type(x) is str else "")
def test_functions(
    module: str, name: str, arguments: Callable[[], tuple[Any, ...]], shapes: list[tuple[int, ...]]
) -> None:
    results = getattr(importlib.import_module(module), name)(*arguments())
    results = results if isinstance(results, tuple) else (results,)
    assert [tuple(x.shape) for x in results[: len(shapes)]] == shapes
    assert all(x.isfinite().all() for x in results if isinstance(x, Tensor))


def test_the_steps_under_the_names_that_diffusers_imports() -> None:
    for name in (
        "flash_attn_forward",
        "flash_attn_backward",
        "flash_attn_varlen_forward",
        "flash_attn_varlen_backward",
    ):
        assert _interface(f"_wrapped_{name}") is _interface(f"_{name}")


def test_modules() -> None:
    mha, rotary = (importlib.import_module(name) for name in ("flash_attn.modules.mha", ROTARY))
    assert len(mha.get_alibi_slopes(H)) == H  # a list, as there
    alone = mha.FlashSelfAttention(True, 0.3, 0.0, (3, 0), SLOPES, True)
    assert alone(_x(B, S, 3, H, D), False).shape == (B, S, H, D)
    assert alone(_x(10, 3, H, D), None, STARTS, 7).shape == (10, H, D)
    cross = mha.FlashCrossAttention(True, 0.3, 0.0, SLOPES, (3, 0), True)
    assert cross(_x(B, S, H, D), _x(B, S, 2, H_K, D), False).shape == (B, S, H, D)
    assert cross(_x(10, H, D), _x(10, 2, H_K, D), None, STARTS, 7, STARTS, 7).shape == (10, H, D)
    turn = rotary.RotaryEmbedding(D, 10000.0, True, 512, None)
    assert turn(_x(B, S, 3, H, D), None, 0, S, None).shape == (B, S, 3, H, D)
    q, kv = turn(_x(B, S, H, D), _x(B, S, 2, H_K, D), 0, S, H)
    assert q.shape == (B, S, H, D) and kv.shape == (B, S, 2, H_K, D)
