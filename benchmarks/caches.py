"""This package's attention over a cache of keys and values, as a function of q alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import Inputs
from torch import Tensor

import flash_attn


def attention_over_cache(inputs: Inputs, page: int = 0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of the problem's k and v as they lie, or in pages of so many rows. With pages, or where sequences are filled
    differently, lengths are on the device."""
    p, caches = inputs.problem, [inputs.k] if inputs.problem.latent else [inputs.k, inputs.v]
    given: dict[str, Any] = {"causal": p.causal}
    if p.float8:
        caches = [x.to(torch.float8_e4m3fn) for x in caches]
        given |= {name: torch.ones(p.kv_heads, device=inputs.device) for name in ("k_descale", "v_descale")}
    if page:
        blocks = p.keys // page
        order = torch.randperm(p.batch * blocks, device=inputs.device)
        given["block_table"] = order.view(p.batch, blocks).int()
        for i, x in enumerate(caches):
            caches[i] = torch.empty_like(x).view(-1, page, *x.shape[2:])
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
            caches[i].view(bits)[order] = x.view_as(caches[i]).view(bits)
    if p.latent:
        caches.append(caches[0][..., : p.latent])
    if page or p.filled:
        filled = p.filled or (p.keys,) * p.batch
        given["cache_seqlens"] = torch.tensor(filled, dtype=torch.int32, device=inputs.device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn.flash_attn_with_kvcache(q, *caches, **given)
        assert isinstance(out, Tensor)
        return out

    return attention
