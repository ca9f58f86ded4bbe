"""`FlashMHA`: multi-head attention as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .functions.kvcache import KVCache, flash_attn_with_kvcache
from .masks.prepared import PreparedMask
from .sdpa.attention import scaled_dot_product_attention
from .sdpa.causal_bias import is_causal_bias, is_top_left, to_mask
from .sdpa.shapes import check_mask_shape
from .torch_op import checks

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias


class FlashMHA(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) in memory linear in the sequence.

    ``W_o(concat_h softmax(Q_h K_h.T / sqrt(head_dim)) V_h)`` with ``Q = W_q(query)``, ``K = W_k(key)``,
    ``V = W_v(value)``. Weights of the textbook module with projections of these names load unchanged.

    Args:
        d_model: features of the input and of the output.
        num_heads: query heads; divides d_model. head_dim is d_model // num_heads.
        num_heads_k: heads of keys and values; divides num_heads (grouped-query attention, Ainslie et al. 2023).
            Default: num_heads.
        dropout: probability of dropping a score in training mode. Default 0.
        causal: position i sees positions 0 .. i. Default False.
        bias: the projections have a bias. Default True.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: sizes that do not divide, or dropout outside [0, 1].
        TypeError: an argument is of another type, such as a bool for dropout.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_heads_k: int | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_model, num_heads = checks.integer("d_model", d_model), checks.integer("num_heads", num_heads)
        num_heads_k = num_heads if num_heads_k is None else checks.integer("num_heads_k", num_heads_k)
        dropout = checks.number("dropout", dropout)
        causal, bias = checks.flag("causal", causal), checks.flag("bias", bias)
        if num_heads < 1 or d_model < 1 or d_model % num_heads != 0:
            raise ValueError(f"num_heads must divide d_model, but num_heads is {num_heads} and d_model {d_model}")
        if num_heads_k < 1 or num_heads % num_heads_k != 0:
            raise ValueError(f"num_heads_k must divide num_heads = {num_heads}, but is {num_heads_k}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], but is {dropout}")
        self.d_model, self.num_heads, self.num_heads_k = d_model, num_heads, num_heads_k
        self.head_dim = d_model // num_heads
        self.dropout, self.causal = dropout, causal
        d_kv = num_heads_k * self.head_dim
        self.W_q = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)
        self.W_k = nn.Linear(d_model, d_kv, bias=bias, device=device, dtype=dtype)
        self.W_v = nn.Linear(d_model, d_kv, bias=bias, device=device, dtype=dtype)
        self.W_o = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | PreparedMask | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attends from `query` to `key`, and sums up `value`.

        Args:
            query: (batch, seq, d_model).
            key: (batch, seq_k, d_model). Default: query, which is self-attention.
            value: (batch, seq_k, d_model). Default: key.
            attn_mask: as in `scaled_dot_product_attention`: bool (True takes part) or floating (added to the scores),
                broadcasts to (batch, num_heads, seq, seq_k), so that a mask for each batch entry is
                (batch, 1, seq, seq_k). With `causal` both hold. Or what `flash_attn.prepare_mask` made of such a mask,
                which then is read once for all layers.
            key_padding_mask: (batch, seq_k) bool, **True keeps a key, False ignores it**: a tokenizer's attention mask,
                and the opposite of `nn.MultiheadAttention`'s. A query left with no key gets zeros (before W_o).
            cache: for causal self-attention without masks and gradients: keys and values of `query` are written behind
                the ``cache.seqlens`` rows that each sequence has in it, and query i sees all rows up to its own. The
                caller counts ``cache.seqlens`` up, once for all layers that share it.

        Returns:
            (batch, seq, d_model).

        Raises:
            ValueError: an input that is not (batch, seq, d_model), a key_padding_mask of another shape, or a
                `torch.nn.attention.bias.CausalBias` for attn_mask with `causal`, or a prepared mask with
                key_padding_mask; or a cache with a key, a value or a mask, or where attention is not causal or drops
                scores.
            TypeError: key_padding_mask is not bool, or an input is no tensor.
            RuntimeError: attn_mask does not fit, or a mask is on another device.

        Jagged nested tensors (batch, ragged seq, d_model) are inputs too; their lengths say what takes part, not masks.
        """
        if cache is not None:
            return self._cached(query, cache, key, value, attn_mask, key_padding_mask)
        key = query if key is None else key
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            if checks.tensor(name, x).dim() != 3 or x.shape[-1] != self.d_model:
                raise ValueError(
                    f"{name} must be (batch, seq, d_model = {self.d_model}), but has shape {tuple(x.shape)}"
                )
        if key_padding_mask is not None:
            if isinstance(attn_mask, PreparedMask):
                raise ValueError(
                    "key_padding_mask must be None when attn_mask is prepared: prepare both as one, "
                    "prepare_mask(attn_mask & key_padding_mask[:, None, None, :])"
                )
            if is_causal_bias(attn_mask):
                attn_mask = self._plain_mask(attn_mask, query.shape[1], key)
            attn_mask = self._merge_masks(attn_mask, key_padding_mask, query, key)
        out = scaled_dot_product_attention(
            self._split_heads(self.W_q(query)),
            self._split_heads(self.W_k(key)),
            self._split_heads(self.W_v(value)),
            attn_mask,
            self.dropout if self.training else 0.0,
            self.causal,
            enable_gqa=self.num_heads_k != self.num_heads,
        )
        return self.W_o(out.transpose(1, 2).flatten(2))

    def _cached(self, query: Tensor, cache: KVCache, *others: object) -> Tensor:
        if any(x is not None for x in others):
            raise ValueError("key, value and masks must be None with a cache, which is for self-attention")
        if not self.causal or (self.training and self.dropout > 0.0):
            raise ValueError(
                "a cache is for causal attention without dropout, but causal is "
                f"{self.causal} and dropout {self.dropout if self.training else 0.0}"
            )
        if checks.tensor("query", query).dim() != 3 or query.shape[-1] != self.d_model:
            raise ValueError(
                f"query must be (batch, seq, d_model = {self.d_model}), but has shape {tuple(query.shape)}"
            )
        q, k, v = (W(query).unflatten(-1, (-1, self.head_dim)) for W in (self.W_q, self.W_k, self.W_v))
        out = flash_attn_with_kvcache(
            q, cache.k, cache.v, k, v, cache_seqlens=cache.seqlens, block_table=cache.block_table, causal=True
        )
        assert isinstance(out, Tensor)
        return self.W_o(out.flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(batch, seq, heads * head_dim) to (batch, heads, seq, head_dim), without a copy."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _plain_mask(self, bias: CausalBias, seq: int, key: Tensor) -> Tensor:
        if self.causal:
            raise ValueError("causal must be False when attn_mask is a CausalBias, but is True")
        if is_top_left(bias):  # fits any scores
            return torch.ones(seq, key.shape[1], dtype=torch.bool, device=key.device).tril()
        return to_mask(bias, key.device)

    def _merge_masks(self, attn_mask: Tensor | None, key_padding_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if checks.tensor("key_padding_mask", key_padding_mask).dtype != torch.bool:
            raise TypeError(
                f"key_padding_mask must be bool (True keeps a key), but is {key_padding_mask.dtype}: convert a mask of "
                "zeros and ones, key_padding_mask.bool()"
            )
        if key.is_nested:
            raise ValueError("key_padding_mask must be None for nested tensors, whose lengths say what takes part")
        if key_padding_mask.shape != key.shape[:2]:
            raise ValueError(
                f"key_padding_mask must be (batch, seq_k) = {tuple(key.shape[:2])}, "
                f"but has shape {tuple(key_padding_mask.shape)}"
            )
        if key_padding_mask.device != key.device:
            raise RuntimeError(
                f"key_padding_mask must be on key's device ({key.device}), but is on {key_padding_mask.device}"
            )
        keep = key_padding_mask[:, None, None, :]
        if attn_mask is None:
            return keep
        checks.tensor("attn_mask", attn_mask)
        check_mask_shape(attn_mask.shape, (query.shape[0], self.num_heads, query.shape[1], key.shape[1]))
        if attn_mask.dtype == torch.bool:
            return attn_mask & keep
        if not attn_mask.is_floating_point():
            raise RuntimeError(f"attn_mask must be bool or floating, but is {attn_mask.dtype}")
        return attn_mask.masked_fill(~keep, float("-inf"))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, num_heads_k={self.num_heads_k}, "
            f"dropout={self.dropout}, causal={self.causal}"
        )
