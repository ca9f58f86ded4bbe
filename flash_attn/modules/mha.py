"""Attention of packed projections as modules without parameters, with the names and arguments of Dao's flash_attn.

Multi-head attention with its projections is `flash_attn.FlashMHA`.
"""

from __future__ import annotations

from torch import Tensor, nn

from flash_attn.functions.arguments import NO_WINDOW, Window
from flash_attn.functions.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.torch_op import checks

__path__: list[str] = []  # so that an import of a name that is missing here asks flash_attn/missing.py


def get_alibi_slopes(nheads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022, section 3), one a head.

    A power of two gets the geometric sequence from 2 ** (-8 / nheads) on with that ratio; another number the sequence
    of the power of two below it, and then every second slope of the power of two above it, as in the authors' code.

    Raises:
        ValueError: nheads is not positive.
    """
    if checks.integer("nheads", nheads) < 1:
        raise ValueError(f"nheads must be positive, but is {nheads}")
    below = 1 << (nheads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    return slopes + [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(nheads - below)]


class _Attention(nn.Module):
    """What both modules are made of: options, of which dropout is for training only."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: Window,
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        if not 0.0 <= checks.number("attention_dropout", attention_dropout) <= 1.0:
            raise ValueError(f"attention_dropout must be in [0, 1], but is {attention_dropout}")
        self.drop = nn.Dropout(attention_dropout)  # applied to probabilities, by the kernels
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size, self.deterministic = window_size, deterministic

    def _options(self, causal: bool | None) -> tuple[float, float | None, bool, Window, float, Tensor | None, bool]:
        """As `flash_attn_func` takes them by position."""
        dropout_p = self.drop.p if self.training else 0.0
        causal = self.causal if causal is None else causal
        return dropout_p, self.softmax_scale, causal, self.window_size, 0.0, self.alibi_slopes, self.deterministic


class FlashSelfAttention(_Attention):
    """Attention of q, k and v in one tensor.

    Args:
        causal: query i sees keys up to i. Default False.
        softmax_scale: default 1 / sqrt(head_dim).
        attention_dropout: probability, in [0, 1], of dropping a score in training. Default 0.
        window_size: (left, right), both included; a negative number is no limit. Default no limits.
        alibi_slopes: (heads) or (batch, heads): -slope * |i - j| is added to the scores.
        deterministic: repeatable gradients. Default False.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = NO_WINDOW,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or with cu_seqlens (total, 3, heads, head_dim).
            causal: in place of the module's own.
            cu_seqlens: (batch + 1) int32: where each packed sequence starts, and where the last one ends.
            max_seqlen: an upper bound of the lengths; needed with cu_seqlens.

        Returns:
            (batch, seqlen, heads, head_dim), or (total, heads, head_dim).
        """
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, *self._options(causal))
        longest = _given("max_seqlen", max_seqlen, "cu_seqlens")
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, *self._options(causal))


class FlashCrossAttention(_Attention):
    """Attention of q to k and v in one tensor. Causal masks and windows are aligned at the bottom right.

    Args:
        causal, softmax_scale, attention_dropout, alibi_slopes, window_size, deterministic: as in
            `FlashSelfAttention`, here in this order.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Window = NO_WINDOW,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            q: (batch, seqlen_q, heads, head_dim), or with cu_seqlens (total_q, heads, head_dim).
            kv: (batch, seqlen_k, 2, heads_k, head_dim), or (total_k, 2, heads_k, head_dim); heads_k divides heads.
            causal: in place of the module's own.
            cu_seqlens: (batch + 1) int32: where each packed sequence of q starts, and where the last one ends.
            max_seqlen: an upper bound of q's lengths.
            cu_seqlens_k: as cu_seqlens, of kv. The two and their bounds are given together or not at all.
            max_seqlen_k: as max_seqlen, of kv.

        Returns:
            (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim).
        """
        if cu_seqlens is None:
            if cu_seqlens_k is not None:
                raise ValueError("cu_seqlens must be given with cu_seqlens_k, but is None")
            return flash_attn_kvpacked_func(q, kv, *self._options(causal))
        if cu_seqlens_k is None:
            raise ValueError("cu_seqlens_k must be given with cu_seqlens, but is None")
        longest_q = _given("max_seqlen", max_seqlen, "cu_seqlens")
        longest_k = _given("max_seqlen_k", max_seqlen_k, "cu_seqlens_k")
        options = self._options(causal)
        return flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, longest_q, longest_k, *options)


def _given(name: str, x: int | Tensor | None, other: str) -> int | Tensor:
    if x is None:
        raise ValueError(f"{name} must be given with {other}, but is None")
    return x
