"""Attention over torch's own tensor subclasses: jagged nested tensors, and DTensor sharded over batch and heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sdpa.arguments import Arguments
from .sdpa.shapes import memory_order
from .torch_op import attention as ops
from .torch_op.private import longest, ragged_dim

_RAGGED_DIM = 2  # of (batch, heads, ragged length, head_dim)


def is_jagged(*tensors: Tensor) -> bool:
    """Whether all are jagged nested tensors (batch, heads, ragged length, head_dim)."""
    return all(
        x.is_nested and x.layout == torch.jagged and x.dim() == 4 and ragged_dim(x) == _RAGGED_DIM for x in tensors
    )


def jagged_attention(given: Arguments) -> Tensor:
    """The packed path: offsets are cu_seqlens, and the lengths of a tensor with holes are seqused.

    Args:
        given: query jagged (batch, heads, ragged L, E), key jagged (batch, heads_k, ragged S, E), value jagged
            (batch, heads_k, ragged S, Ev), no attn_mask.

    Returns:
        Jagged (batch, heads, ragged L, Ev), with query's offsets.

    Raises:
        RuntimeError: the numbers of heads do not fit.
    """
    query: Any
    key: Any
    query, key, value = given[:3]
    heads, heads_k = query.shape[1], key.shape[1]
    if heads_k != heads and heads_k != 1 and not given.enable_gqa:
        raise RuntimeError(f"key must have the heads of query, {heads}, or enable_gqa be True, but it has {heads_k}")
    _check_same_lengths(key, value)
    q, k, v = (x.transpose(1, 2).values() for x in (query, key, value))  # (total, heads, columns)
    holes = query.lengths() is not None or key.lengths() is not None
    starts_q = _starts(query, holes)
    same = key.offsets() is query.offsets()  # kernels see one tensor then, and that the lengths are equal
    starts_k = starts_q if same else _starts(key, holes)
    out, _ = ops.attention(
        q,
        k,
        v,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        seqused_q=_used(query),
        seqused_k=_used(key),
        max_seqlen_q=int(starts_q.diff().max()) if holes else longest(query),
        max_seqlen_k=int(starts_k.diff().max()) if holes else longest(key),
        softmax_scale=given.scale,
        causal=ops.TOP_LEFT if given.is_causal else ops.NONE,
        dropout_p=given.dropout_p,
    )
    packed: Tensor = torch.nested.nested_tensor_from_jagged(out, query.offsets(), query.lengths())
    return packed.transpose(1, 2)


def _check_same_lengths(key: Any, value: Any) -> None:
    """Waits for the device where the two do not share their offsets; compiled code can't look into them."""
    for what in ("offsets", "lengths"):
        of_key, of_value = getattr(key, what)(), getattr(value, what)()
        if of_key is of_value or torch.compiler.is_compiling():
            continue
        if of_key is None or of_value is None or not torch.equal(of_key, of_value):
            raise RuntimeError(f"key and value must have the same {what}, but have {of_key} and {of_value}")


def _starts(x: Any, holes: bool) -> Tensor:
    """cu_seqlens. With holes rows may lie before the first entry too, so an entry of which nothing is used leads."""
    starts: Tensor = x.offsets().to(torch.int32)
    return torch.cat((starts.new_zeros(1), starts)) if holes else starts


def _used(x: Any) -> Tensor | None:
    if x.lengths() is None:
        return None
    lengths: Tensor = x.lengths().to(torch.int32)
    return torch.cat((lengths.new_zeros(1), lengths))


def is_dtensor(*tensors: Tensor) -> bool:
    if type(tensors[0]) is Tensor or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(x, DTensor) for x in tensors)


def distributed_attention(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
) -> Tensor:
    """Each rank attends to its own batch entries and heads; nothing is communicated.

    Args:
        attend: attention of local tensors.
        query: DTensor (batch, heads, L, E), on every mesh dimension replicated or sharded over batch (0) or heads (1).
        key: as query, with the same placements. Where those shard, it has query's size or, over heads, a multiple of
            the shards.
        value: as key.
        attn_mask: None, a DTensor (batch, heads, L | 1, S | 1) with query's placements, or, if replicated on every
            rank, a tensor that broadcasts over the sharded dimensions.

    Returns:
        DTensor with query's placements.

    Raises:
        NotImplementedError: another placement, such as one sharded over the sequence, or heads that do not divide.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not all(isinstance(x, DTensor) for x in (query, key, value)):
        raise NotImplementedError("query, key and value must all be DTensors, or none")
    accepted = (Replicate(), Shard(0), Shard(1))
    placements = query.placements
    if any(x.placements != placements for x in (key, value)) or any(p not in accepted for p in placements):
        raise NotImplementedError(
            "query, key and value must have the same placements, each Replicate, Shard(0) (batch) or Shard(1) (heads), "
            f"but have {placements}, {key.placements} and {value.placements}"
        )
    sharded = [p.dim for p in placements if isinstance(p, Shard)]
    if sharded and not query.dim() == key.dim() == value.dim() == 4:
        raise NotImplementedError(
            "sharded DTensors must be (batch, heads, length, columns), but query, key and value have shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    for name, x in (("key", key), ("value", value)):
        _check_shards(name, x, query)
    if isinstance(attn_mask, DTensor):
        fits = attn_mask.dim() == 4 and all(attn_mask.shape[d] == query.shape[d] for d in sharded)
        if attn_mask.placements != placements or (sharded and not fits):
            raise NotImplementedError(
                f"attn_mask must be (batch, heads, L, S) with query's placements {placements}, but has "
                f"{attn_mask.placements} and shape {tuple(attn_mask.shape)}"
            )
        attn_mask = attn_mask.to_local()
    local = attend(query.to_local(), key.to_local(), value.to_local(), attn_mask)
    shape = (*query.shape[:-1], value.shape[-1])
    order = memory_order(query)
    dense = torch.empty([shape[i] for i in order], device="meta").permute([order.index(i) for i in range(len(order))])
    return DTensor.from_local(
        local, query.device_mesh, placements, run_check=False, shape=dense.shape, stride=dense.stride()
    )


def _check_shards(name: str, x: Any, query: Any) -> None:
    """Each rank must hold just the batch entries and heads of `x` that its part of `query` attends to."""
    from torch.distributed.tensor import Shard

    for dim, what in ((0, "batch entries"), (1, "heads")):
        shards = math.prod(
            x.device_mesh.size(i) for i, p in enumerate(x.placements) if isinstance(p, Shard) and p.dim == dim
        )
        even = dim == 1 and x.shape[1] % shards == 0 and query.shape[1] % shards == 0
        if shards > 1 and x.shape[dim] != query.shape[dim] and not even:
            raise NotImplementedError(
                f"over {shards} shards, {name} must have query's {query.shape[dim]} {what}, but has {x.shape[dim]}; "
                "heads may differ where both numbers are multiples of the shards"
            )
