"""`flash_attn_varlen_func`: attention of packed sequences, with the names and defaults of Dao-AILab's `flash_attn`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .. import tensor_subclasses
from .arguments import NO_WINDOW, Lengths, Options, Outputs, Window, attention
from .kvcache import attention_of_pages, named_table
from .other_versions import VarlenExtras, check_hints, refuse

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: Window = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    return_attn_probs: Literal[False] = ...,
    block_table: Tensor | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **extras: Unpack[VarlenExtras],
) -> Tensor: ...


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: Window = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    return_attn_probs: Literal[False] = ...,
    block_table: Tensor | None = ...,
    *,
    return_lse: Literal[True],
    **extras: Unpack[VarlenExtras],
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: Window = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    *,
    return_attn_probs: Literal[True],
    block_table: Tensor | None = ...,
    return_lse: bool = ...,
    **extras: Unpack[VarlenExtras],
) -> tuple[Tensor, Tensor, None]: ...


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: Literal[True],
    block_table: Tensor | None = ...,
    *,
    return_lse: bool = ...,
    **extras: Unpack[VarlenExtras],
) -> tuple[Tensor, Tensor, None]: ...


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size: Window = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    deterministic: bool = ...,
    return_attn_probs: bool = ...,
    block_table: Tensor | None = ...,
    *,
    return_lse: bool = ...,
    **extras: Unpack[VarlenExtras],
) -> Outputs: ...


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    page_table: Tensor | None = None,
    **others: Any,
) -> Outputs:
    """Attention of packed sequences of different lengths. Arguments not listed are those of `flash_attn_func`.

    Args:
        q: (total_q, num_heads, head_dim).
        k: (total_k, num_heads_k, head_dim).
        v: (total_k, num_heads_k, head_dim_v).
        cu_seqlens_q: (batch + 1) int32, from 0 on: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1 of q.
            Rows behind the last sequence get zeros.
        cu_seqlens_k: (batch + 1) int32, the same for k and v.
        max_seqlen_q: at least the longest sequence in q: an int, or a tensor of one integer, which is not read where
            that would wait for a device. None is allowed: results never depend on it.
        max_seqlen_k: at least the longest sequence in k.
        block_table: (batch, blocks) int32: keys and values lie in pages, k (pages, page_size, num_heads_k, head_dim)
            and v likewise, with a last stride of 1, and rows i * page_size and on of sequence b in page
            block_table[b, i], seqused_k[b] or cu_seqlens_k[b + 1] - cu_seqlens_k[b] rows. There is no gradient then.
        seqused_q: (batch) int32: only so many rows of each sequence take part, others get zeros.
        seqused_k: (batch) int32, the same for k and v.
        page_table: another name for block_table.

    Returns:
        As `flash_attn_func`, with out (total_q, num_heads, head_dim_v) and lse (num_heads, total_q).

    Raises:
        NotImplementedError: DTensors, or what else is not supported, are given; with block_table dropout or seqused_q.
    """
    table_name, block_table = named_table(block_table, page_table)
    if others or type(num_splits) is not int or num_splits < 0 or pack_gqa is not None:
        check_hints(num_splits, pack_gqa)
        refuse("flash_attn_varlen_func", others)
    options = Options(
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_lse,
        learnable_sink,
        s_aux,
    )
    if type(q) is not Tensor and tensor_subclasses.is_dtensor(q, k, v):
        raise NotImplementedError(
            "q must not be a DTensor, but is: sequences are packed across ranks; call the function with q.to_local(), "
            "k.to_local(), v.to_local() and the sequences of this rank"
        )
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    if block_table is not None:
        return attention_of_pages(q, k, v, options, lengths, block_table, table_name)
    return attention(q, k, v, options, lengths)
