"""Any strides are taken: those of the small tensors, and of what is expanded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_attn.torch_op import attention as ops

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
