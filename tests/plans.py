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
