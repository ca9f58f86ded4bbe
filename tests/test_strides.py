"""Any strides are taken: those of the small tensors, and of what is expanded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from flash_attn.torch_op import attention as ops
from flash_attn.torch_op.library import dense_strides_like

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _every_other(x: torch.Tensor) -> torch.Tensor:
    """The same values, every other one of a larger tensor whose others are wrong."""
    return torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0]


def _arguments(device: str) -> dict[str, Any]:
    starts = torch.tensor([0, 3, 9], dtype=torch.int32)
    tensors = {name: torch.randn(9, 4, 8) for name in "qkv"} | {
        "alibi_slopes": torch.rand(2, 4),
        "sinks": torch.randn(4),
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts.clone(),
        "seqused_q": torch.tensor([2, 6], dtype=torch.int32),
        "seqused_k": torch.tensor([3, 5], dtype=torch.int32),
        "rng_state": torch.tensor([3, 4]),
    }
    options = {"max_seqlen_q": 6, "max_seqlen_k": 6, "dropout_p": 0.25}
    return {name: x.to(device) for name, x in tensors.items()} | options


def _out_and_gradients(arguments: dict[str, Any]) -> list[torch.Tensor]:
    differentiable = [arguments[name] for name in ("q", "k", "v", "alibi_slopes", "sinks")]
    leaves = [x.detach().requires_grad_() for x in differentiable]
    given = arguments | dict(zip(("q", "k", "v", "alibi_slopes", "sinks"), leaves, strict=True))
    out, lse = ops.attention(**given)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaves)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["q", *list(_arguments("cpu"))[3:10]])
def test_a_tensor_of_any_stride_gives_the_same(name: str, device: str) -> None:
    arguments = _arguments(device)
    strided = arguments | {name: _every_other(arguments[name])}
    assert not strided[name].is_contiguous()
    for x, y in zip(_out_and_gradients(arguments), _out_and_gradients(strided), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_sinks_slopes_and_lengths(device: str) -> None:
    q = torch.randn(3, 5, 4, 8, device=device)
    small = {
        "sinks": torch.full((1,), 0.3, device=device).expand(4),
        "alibi_slopes": torch.full((1, 1), 0.2, device=device).expand(3, 4),
        "seqused_k": torch.full((1,), 4, dtype=torch.int32, device=device).expand(3),
    }
    out, lse = ops.attention(q, q, q, **small)
    expected_out, expected_lse = ops.attention(q, q, q, **{name: x.contiguous() for name, x in small.items()})
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(2, 1, 5, 8), (1, 3, 5, 8), (2, 3, 1, 8), (1, 1, 5, 8), (1, 1, 1, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_out_is_dense_as_torch_empty_like_makes_it(order: tuple[int, ...], sizes: tuple[int, ...], device: str) -> None:
    axes = [order.index(i) for i in range(3)]
    q = torch.randn(sizes, device=device).permute(*order, 3).contiguous().permute(*axes, 3).expand(2, 3, 5, 8)
    k = torch.randn(2, 3, 5, 8, device=device)
    out, _ = ops.attention(q, k, k, heads_first=True)
    assert out.stride() == torch.empty_like(q).stride()
    assert dense_strides_like(q, 8) == list(out.stride())


@pytest.mark.parametrize("device", DEVICES)
def test_copy_on_write_tensors_stay_lazy(device: str) -> None:
    arguments = _arguments(device)
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
    lazy = {name: torch._lazy_clone(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    out, _ = ops.attention(**lazy)
    grad = torch._lazy_clone(torch.randn_like(out))
    torch.autograd.grad(out, leaves, grad)
    tensors = {name: x for name, x in lazy.items() if isinstance(x, torch.Tensor)} | {"grad": grad}
    assert [name for name, x in tensors.items() if not torch._C._is_cow_tensor(x)] == []
