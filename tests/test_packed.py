"""Functions that take q, k and v in one tensor do what `flash_attn_func` does with the parts, gradients too."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flash_attn
from flash_attn import flash_attn_interface as interface

OPTIONS = {"softmax_scale": 0.3, "causal": True, "window_size": (5, 0), "softcap": 2.0, "deterministic": True}
STARTS = torch.tensor([0, 3, 3, 10], dtype=torch.int32)


def _equal(packed: Callable[..., Tensor], plain: Callable[..., Tensor], *tensors: Tensor) -> None:
    """`packed(*tensors)` and `plain(*tensors)` have the same results and gradients."""
    results = []
    for function in (packed, plain):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_qkvpacked() -> None:
    _equal(
        lambda qkv: interface.flash_attn_qkvpacked_func(qkv, **OPTIONS),
        lambda qkv: interface.flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **OPTIONS),
        torch.randn(2, 7, 3, 4, 8),
    )


def test_kvpacked_with_grouped_heads() -> None:
    _equal(
        lambda q, kv: interface.flash_attn_kvpacked_func(q, kv, **OPTIONS),
        lambda q, kv: interface.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **OPTIONS),
        *(torch.randn(2, 7, 4, 8), torch.randn(2, 9, 2, 2, 8)),
    )


def test_varlen_qkvpacked() -> None:
    _equal(
        lambda qkv: interface.flash_attn_varlen_qkvpacked_func(qkv, STARTS, 7, **OPTIONS),
        lambda qkv: interface.flash_attn_varlen_func(*qkv.unbind(1), STARTS, STARTS, 7, 7, **OPTIONS),
        torch.randn(10, 3, 4, 8),
    )


def test_varlen_kvpacked() -> None:
    starts_k = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    _equal(
        lambda q, kv: interface.flash_attn_varlen_kvpacked_func(q, kv, STARTS, starts_k, 7, 7, **OPTIONS),
        lambda q, kv: interface.flash_attn_varlen_func(q, *kv.unbind(1), STARTS, starts_k, 7, 7, **OPTIONS),
        *(torch.randn(10, 4, 8), torch.randn(13, 2, 2, 8)),
    )


def test_every_option_reaches_the_function_and_statistics_come_back() -> None:
    qkv = torch.randn(2, 7, 3, 4, 8)
    slopes = torch.rand(4)
    arguments = (0.0, 0.3, True, (5, 0), 2.0, slopes, True, True)
    packed = interface.flash_attn_qkvpacked_func(qkv, *arguments)
    plain = interface.flash_attn_func(*qkv.unbind(2), *arguments)
    assert len(packed) == len(plain) == 3
    torch.testing.assert_close(packed[:2], plain[:2], rtol=0, atol=0)
    torch.manual_seed(1)
    packed = interface.flash_attn_qkvpacked_func(qkv, dropout_p=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(packed, interface.flash_attn_func(*qkv.unbind(2), dropout_p=0.5), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in interface.__all__ if "packed" in name])
def test_options_and_defaults_are_those_of_flash_attn_func(name: str) -> None:
    options = list(inspect.signature(getattr(interface, name)).parameters.values())[-8:]
    expected = inspect.signature(interface.flash_attn_func).parameters
    assert [(x.name, x.default) for x in options] == [(x.name, expected[x.name].default) for x in options]
    assert options[0].name == "dropout_p" and options[-1].name == "return_attn_probs"
    assert getattr(flash_attn, name) is getattr(interface, name)


def test_other_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"qkv must be \(batch, seqlen, 3, heads, head_dim\), but has shape \(2, 7, 2"):
        interface.flash_attn_qkvpacked_func(torch.randn(2, 7, 2, 4, 8))
    with pytest.raises(ValueError, match=r"kv must be \(total, 2, heads, head_dim\), but has shape \(10, 4, 8\)"):
        interface.flash_attn_varlen_kvpacked_func(torch.randn(10, 4, 8), torch.randn(10, 4, 8), STARTS, STARTS, 7, 7)


@pytest.mark.parametrize("function", [interface.flash_attn_qkvpacked_func, interface.flash_attn_varlen_qkvpacked_func])
def test_refusals_name_the_packed_tensor(function: Callable[..., Tensor]) -> None:
    varlen = function is interface.flash_attn_varlen_qkvpacked_func
    qkv, lengths = torch.randn((10, 3, 4, 8) if varlen else (2, 7, 3, 4, 8)), (STARTS, 7) if varlen else ()
    for value in (None, [1.0], qkv.numpy()):
        with pytest.raises(TypeError, match=r"^qkv must be a Tensor"):
            function(value, *lengths)
    with pytest.raises(NotImplementedError, match=r"^qkv must be .*float8_e4m3fn.*qkv.to\(torch.bfloat16\)"):
        function(qkv.to(torch.float8_e4m3fn), *lengths)
    with pytest.raises(NotImplementedError, match=r"^qkv must be a plain tensor, but is nested"):
        function(torch.nested.nested_tensor([qkv[0], qkv[1]], layout=torch.jagged), *lengths)
    with pytest.raises(TypeError, match=r"^dropout_p must be a number, but is True"):
        function(qkv, *lengths, True)


def test_refusals_name_lengths_and_keys_as_they_were_given() -> None:
    q, qkv = torch.randn(10, 4, 8), torch.randn(10, 3, 4, 8)
    with pytest.raises(RuntimeError, match=r"^cu_seqlens must be int32"):
        interface.flash_attn_varlen_qkvpacked_func(qkv, STARTS.long(), 7)
    with pytest.raises(TypeError, match=r"^cu_seqlens must be a Tensor.*torch.as_tensor\(cu_seqlens\)"):
        interface.flash_attn_varlen_qkvpacked_func(qkv, [0, 10], 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^max_seqlen must be an int"):
        interface.flash_attn_varlen_qkvpacked_func(qkv, STARTS, 7.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^kv must be a Tensor"):
        interface.flash_attn_kvpacked_func(q[None], None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="q and kv must have the same head_dim"):
        interface.flash_attn_varlen_kvpacked_func(q[..., :5], qkv[:, 1:], STARTS, STARTS, 7, 7)
