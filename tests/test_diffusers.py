"""The attention backends `flash` and `flash_varlen` of diffusers, as they come, call this package."""

from __future__ import annotations

import importlib.metadata
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
from flash_attn import flash_attn_interface as interface
from introspection import needs_introspection

pytest.importorskip("diffusers")
if "flash-attn" not in importlib.metadata.packages_distributions().get("flash_attn", []):
    pytest.skip("diffusers looks for an installed flash-attn", allow_module_level=True)
from diffusers import FluxTransformer2DModel
from diffusers.models import attention_dispatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _qkv(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, 33, 4, 16, generator=generator).to(device, torch.bfloat16).requires_grad_() for _ in range(3)
    ]


def _with_gradients(function: Any, qkv: list[Tensor]) -> list[Tensor]:
    out = function(*qkv)
    return [out, *torch.autograd.grad(out.float().square().sum(), qkv)]


def test_what_it_imports_is_here() -> None:
    assert attention_dispatch._CAN_USE_FLASH_ATTN
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        assert getattr(attention_dispatch, name) is getattr(flash_attn, name)
    for name in ("_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward"):
        assert getattr(attention_dispatch, name) is getattr(interface, name)


@needs_introspection
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
def test_a_backend_does_what_the_native_one_does(backend: str, causal: bool, device: str) -> None:
    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_dispatch.dispatch_attention_fn(q, k, v, is_causal=causal, backend=name)

    qkv = _qkv(device)
    assert len(flash_attn.explain(lambda: attend(backend, *qkv)).calls) == 1
    ours, native = (_with_gradients(lambda *x, name=name: attend(name, *x), qkv) for name in (backend, "native"))
    torch.testing.assert_close(ours, native, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_goes_through_the_varlen_backend(device: str) -> None:
    lengths = torch.tensor([33, 20], device=device)
    mask = torch.arange(33, device=device) < lengths[:, None]

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = mask if name == "flash_varlen" else mask[:, None, None]
        return attention_dispatch.dispatch_attention_fn(q, k, v, attn_mask=given, backend=name)

    qkv = _qkv(device)
    ours, native = (_with_gradients(lambda *x, name=name: attend(name, *x), qkv) for name in ("flash_varlen", "native"))
    torch.testing.assert_close(ours, native, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_the_steps_that_context_parallel_takes(device: str) -> None:
    """Its forward and backward ops, called as it calls them, against the function whose parts they are."""
    qkv = _qkv(device)
    context = types.SimpleNamespace()
    context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
    plain = [x.detach() for x in qkv]
    out, lse = attention_dispatch._flash_attention_forward_op(context, *plain, is_causal=True, return_lse=True)
    assert lse.shape == (2, 33, 4)
    dout = (2 * out.float()).to(out)
    gradients = attention_dispatch._flash_attention_backward_op(context, dout)
    expected = _with_gradients(lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True), qkv)
    torch.testing.assert_close([out, *gradients], expected, rtol=0, atol=2e-2)


@needs_introspection
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_told_to_use_it_computes_the_same(device: str) -> None:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    others = {"in_channels": 8, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}
    model = FluxTransformer2DModel(patch_size=1, guidance_embeds=False, **sizes, **others).to(device, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    inputs = {
        "hidden_states": random(1, 16, 8),
        "encoder_hidden_states": random(1, 7, 32),
        "pooled_projections": random(1, 16),
        "timestep": torch.tensor([0.5], device=device, dtype=torch.bfloat16),
        "img_ids": random(16, 3).float(),
        "txt_ids": random(7, 3).float(),
    }
    results = {}
    with torch.no_grad():
        for backend in ("native", "flash"):
            model.set_attention_backend(backend)
            results[backend] = model(**inputs).sample
        assert len(flash_attn.explain(lambda: model(**inputs)).calls) == 2
    torch.testing.assert_close(results["flash"], results["native"], rtol=3e-2, atol=3e-2)
