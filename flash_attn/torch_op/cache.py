"""The ops on a cache of keys and values: `attend_cache`, and `append_and_attend`, which writes rows into it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import private
from .library import empty_outputs, registrations
from .registered.autograd import call_op, requires_grad
from .registered.refusals import refuse_named

attend_cache_op = torch.ops.flash_attn.attend_cache.default
append_and_attend_op = torch.ops.flash_attn.append_and_attend.default


class Attend(NamedTuple):
    """The arguments of `attend_cache` in the order of the schema (csrc/ops/arguments/cache_arguments.h): q (batch,
    seqlen_q, num_heads, head_dim), with cu_seqlens_q (total_q, num_heads, head_dim); k_cache and v_cache (entries,
    seqlen, num_heads_k, head_dim and head_dim_v), with block_table (pages, page_size, ...), last stride 1; alibi_slopes
    and sinks as of attention; the other tensors int32: cu_seqlens_q (batch + 1), cache_seqlens, cache_batch_idx and
    cache_leftpad (batch), block_table (batch, blocks). `appended` rows are not counted in cache_seqlens. Caches of
    float8_e4m3fn hold multiples of k_descale and v_descale, (batch, num_heads_k) or (num_heads_k), float32."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cache_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    max_seqlen_q: int
    appended: int
    softmax_scale: float | None
    causal: int
    window_left: int
    window_right: int
    softcap: float


class AppendAndAttend(NamedTuple):
    """The arguments of `append_and_attend`: k and v (batch, seqlen_new, num_heads_k, head_dim and head_dim_v) are
    written behind the cache_seqlens rows of each sequence; rotary_cos and rotary_sin (positions, rotary_dim / 2) turn
    them and q; total_seqlens is cache_seqlens + seqlen_new, which many query rows over a plain cache want."""

    k_cache: Tensor
    v_cache: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    cache_seqlens: Tensor
    total_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    softmax_scale: float | None
    causal: int
    window_left: int
    window_right: int
    softcap: float
    rotary_interleaved: bool

    def attention(self) -> Attend:
        """What follows when the rows are there."""
        counted = self.total_seqlens is not None
        return Attend(
            self.q,
            self.k_cache,
            self.v_cache,
            self.alibi_slopes,
            self.sinks,
            None,
            self.total_seqlens if counted else self.cache_seqlens,
            self.cache_batch_idx,
            self.cache_leftpad,
            self.block_table,
            self.k_descale,
            self.v_descale,
            self.q.shape[1],
            0 if counted else self.k.shape[1],
            self.softmax_scale,
            self.causal,
            self.window_left,
            self.window_right,
            self.softcap,
        )


@torch.library.register_fake("flash_attn::attend_cache", lib=registrations())
def _attend_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = Attend(*arguments)
    refuse_named("check_cache", given._asdict())
    return empty_outputs(given.q, given.v_cache, False, given.cu_seqlens_q is not None)


@torch.library.register_fake("flash_attn::append_and_attend", lib=registrations())
def _append_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = AppendAndAttend(*arguments)
    refuse_named("check_append", given._asdict())
    return empty_outputs(given.q, given.v_cache, False, False)


_NO_GRADIENT = (
    "derivative for flash_attn::attend_cache is not implemented: attention over a cache has no gradient. Use "
    "flash_attn_func for training, or torch.no_grad() where none is meant"
)


class _NoGradient(private.SingleLevelFunction):  # type: ignore[misc]
    """One of the ops where something requires grad: its derivative raises, and is never zero."""

    @staticmethod
    def forward(op: Any, *arguments: Any) -> Any:
        return call_op(op, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise NotImplementedError(_NO_GRADIENT)


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    return [x for x in arguments if isinstance(x, Tensor)]


def _register(name: str, op: Any) -> None:
    def kernel(*arguments: Any) -> Any:
        if not requires_grad(_tensors(arguments)):
            return call_op(op, *arguments)
        with private.single_level():
            return private.apply_of(_NoGradient)(op, *arguments)

    registrations().impl(name, kernel, "Autograd")


_register("attend_cache", attend_cache_op)
_register("append_and_attend", append_and_attend_op)


def attend_cache(arguments: Attend | AppendAndAttend) -> tuple[Tensor, Tensor]:
    """Attention of new queries over a cache, with what `flash_attn.torch_op.attention.attention` says of scores; with
    `AppendAndAttend` after rows have been written to it.

    Returns:
        out and lse, as of attention.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; nothing is written then. Rows that the
            cache has no room for, of lengths that only the device knows, are left out.
    """
    op = attend_cache_op if isinstance(arguments, Attend) else append_and_attend_op
    if torch.compiler.is_compiling() or private.ops_are_watched() or requires_grad(_tensors(arguments)):
        out, lse = op(*arguments)
    else:
        out, lse = call_op(op, *arguments)
    if isinstance(arguments, AppendAndAttend) and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((arguments.k_cache, arguments.v_cache))
    return out, lse
