"""Code of people who use the package, for type checkers alone: `test_typing.py` has it checked in strict mode."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import flash_attn
from flash_attn import (
    FlashMHA,
    PreparedMask,
    flash_attn_func,
    flash_attn_varlen_func,
    prepare_mask,
    scaled_dot_product_attention,
)
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def batched(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, train: bool) -> Tensor:
    out = flash_attn_func(q, k, v, causal=True)
    assert_type(out, Tensor)
    assert_type(flash_attn_func(q, k, v, 0.1, None, True, (128, 0), 0.0, slopes, True), Tensor)
    assert_type(flash_attn_func(q, k, v, 0.0, None, False, (-1, -1), 0.0, None, False, False), Tensor)
    assert_type(flash_attn_func(q, k, v, window_size=[128, None], s_aux=slopes), Tensor)
    assert_type(flash_attn_func(q, k, v, return_attn_probs=False, return_lse=False), Tensor)
    assert_type(flash_attn_func(q, k, v, learnable_sink=slopes, num_splits=1, pack_gqa=True), Tensor)
    out, lse = flash_attn_func(q, k, v, dropout_p=0.1, return_lse=True)
    assert_type(lse, Tensor)
    out, lse, probabilities = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert_type(probabilities, None)
    out, lse, _ = flash_attn_func(q, k, v, 0.0, None, False, (-1, -1), 0.0, None, False, True)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, return_lse=True)
    result = flash_attn_func(q, k, v, return_attn_probs=train)
    assert_type(result, Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None])
    return (out + lse.sum()).flatten(2) + (result if isinstance(result, Tensor) else result[0]).flatten(2)


def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, layer: FlashMHA) -> Tensor:
    mask = prepare_mask(keep)
    assert_type(mask, PreparedMask)
    assert_type(prepare_mask(lengths=[3, 4]), PreparedMask)
    assert_type(prepare_mask(lengths=[[3, 4], [7]], device="cpu").visited, float)
    assert_type(mask.to_dense(), Tensor)
    out, _ = flash_attn_func(q, k, v, attn_mask=mask, return_lse=True)
    assert_type(flash_attn_func(q, k, v, attn_mask=keep), Tensor)
    out = out + scaled_dot_product_attention(q, k, v, mask) + scaled_dot_product_attention(q, k, v, attn_mask=keep)
    result: Tensor = layer(out.flatten(2), attn_mask=mask)
    return result


def packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: Tensor, train: bool) -> Tensor:
    out = flash_attn_varlen_func(q, k, v, starts, starts, 512, longest, causal=True)
    assert_type(out, Tensor)
    assert_type(flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, 0.1, 0.5, True, (-1, -1), 0.0, None), Tensor)
    out, lse = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=5, max_seqlen_k=5, return_lse=True
    )
    out, lse, none = flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, return_attn_probs=True, seqused_k=starts)
    assert_type(none, None)
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, starts, starts, 5, 5, 0.0, None, False, (-1, -1), 0.0, None, False, True
    )
    result = flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, return_lse=train)
    assert_type(result, Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None])
    return out.view(-1, 64) @ lse


def in_one_tensor(q: Tensor, qkv: Tensor, starts: Tensor) -> Tensor:
    assert_type(flash_attn_qkvpacked_func(qkv, 0.1, causal=True), Tensor)
    assert_type(flash_attn_kvpacked_func(q, qkv[:, :, 1:], softmax_scale=0.5), Tensor)
    out, lse, none = flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    assert_type(none, None)
    out, lse, _ = flash_attn_varlen_qkvpacked_func(qkv, starts, 5, return_attn_probs=True)
    out, lse, _ = flash_attn_varlen_kvpacked_func(q, qkv, starts, starts, 5, 5, return_attn_probs=True)
    return flash_attn_varlen_qkvpacked_func(qkv, starts, 5) + out + lse


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = FlashMHA(64, 8, num_heads_k=2, dropout=0.1, causal=True, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        with flash_attn.replace_sdpa():
            out = scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5, enable_gqa=False)
        assert_type(out, Tensor)
        print(flash_attn.explain(out, x, x).calls[0].forward.family.upper())
        y: Tensor = self.attention(out)
        return y
