"""What the dispatcher and the planners choose, for GPUs that need not be there: no kernel runs."""

from __future__ import annotations

from typing import Any

from flash_attn.torch_op.arguments import Options
from introspection import _C

H200 = (90, 132, 232448, 60 << 20)  # compute capability, SMs, shared memory of a block, L2 cache
A100 = (80, 108, 166912, 40 << 20)


def plan(
    batch: int = 4,
    heads: int = 16,
    seqlen_q: int = 4096,
    head_dim: int = 128,
    *,
    seqlen_k: int | None = None,
    heads_k: int | None = None,
    head_dim_v: int | None = None,
    dtype: str = "bfloat16",
    device: tuple[int, int, int, int] = H200,
    address: int = 1 << 20,
    tensors: dict[str, Any] | None = None,
    wants_dmask: bool = False,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Of (batch, seqlen, heads, head_dim) tensors, dense."""

    def tensor(seqlen: int, n: int, columns: int) -> tuple[int, str, int, list[int], list[int]]:
        return (address, dtype, 0, [batch, seqlen, n, columns], [seqlen * n * columns, n * columns, columns, 1])

    seqlen_k, heads_k = seqlen_k or seqlen_q, heads_k or heads
    values = {
        "q": tensor(seqlen_q, heads, head_dim),
        "k": tensor(seqlen_k, heads_k, head_dim),
        "v": tensor(seqlen_k, heads_k, head_dim_v or head_dim),
    }
    defaults = Options(seqlen_q, seqlen_k, None, 0, -1, -1, 0.0, 0.0, False, False)
    needs = [True] * 3 + [wants_dmask, False, False]
    return _C.plan(values | (tensors or {}), defaults._replace(**options)._asdict(), needs, device)


BASE = 1 << 20
CACHE_OPTIONS: dict[str, Any] = {
    "max_seqlen_q": 0,
    "appended": 0,
    "softmax_scale": None,
    "causal": 0,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
}


def cache_tensor(dtype: str, *shape: int, address: int = BASE) -> tuple[int, str, int, list[int], list[int]]:
    strides = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * shape[i + 1]
    return address, dtype, 0, list(shape), strides


def plan_cache(
    rows: int = 1,
    keys: int = 4096,
    *,
    batch: int = 4,
    heads: int = 32,
    heads_k: int = 8,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    page_size: int = 0,
    device: tuple[int, ...] = H200,
    address: int = BASE,
    stored: str = "",
    options: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    shape = (batch * keys // page_size, page_size) if page_size else (batch, keys)
    caches = {
        name: cache_tensor(stored or dtype, *shape, heads_k, head_dim, address=address + place)
        for name, place in (("k_cache", 0), ("v_cache", BASE))
    }
    tensors = {"q": cache_tensor(dtype, batch, rows, heads, head_dim), **caches}
    if page_size:
        tensors["block_table"] = cache_tensor("int32", batch, keys // page_size)
    result: dict[str, Any] = _C.plan_cache(tensors | more, CACHE_OPTIONS | (options or {}), device)
    return result
