"""Rotary position embeddings (Su et al. 2021, section 3.4) with the names and arguments of Dao's flash_attn.

A pair of columns (x1, x2) at position t is turned by the angle t * inv_freq: (x1 cos - x2 sin, x1 sin + x2 cos). Pairs
are column j and j + rotary_dim / 2, or 2j and 2j + 1 where interleaved. fp16 and bf16 are turned in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_attn.torch_op import checks
from flash_attn.torch_op.rotary import turn

Names = tuple[str, str, str]
"""What the caller calls x, cos and sin."""


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    names: Names,
) -> None:
    for name, given in zip(names, (x, cos, sin), strict=True):
        checks.plain(name, given)
    named, cosines, sines = names
    if not isinstance(offsets, Tensor):
        checks.integer("seqlen_offsets", offsets)
    elif offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seqlen_offsets must be an int or (batch) integers, but is {checks.described(offsets)}")
    if cu_seqlens is not None and checks.plain("cu_seqlens", cu_seqlens).dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be (batch + 1) int32, but is {checks.described(cu_seqlens)}")
    if x.dim() != (4 if cu_seqlens is None else 3):
        expected = "(batch, seqlen, heads, head_dim)" if cu_seqlens is None else "(total, heads, head_dim)"
        raise ValueError(f"{named} must be {expected}, but has shape {tuple(x.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"{cosines} and {sines} must be (seqlen, rotary_dim / 2), but have shapes {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"{cosines} has {cos.shape[1]} columns, which turn {2 * cos.shape[1]} of {named}, but {named} has "
            f"{x.shape[-1]}"
        )
    if cu_seqlens is not None and max_seqlen is None:
        raise ValueError("max_seqlen is needed with cu_seqlens")
    rows = x.shape[1] if cu_seqlens is None else _bound(max_seqlen)
    needed = rows + (0 if isinstance(offsets, Tensor) else offsets)
    if needed > cos.shape[0]:
        raise ValueError(f"{cosines} and {sines} have {cos.shape[0]} positions, but {needed} are needed")


def _bound(max_seqlen: int | Tensor | None) -> int:
    """As `checks.integer`, or a tensor's."""
    if isinstance(max_seqlen, Tensor) and checks.is_integral(max_seqlen):
        return int(max_seqlen)
    return checks.integer("max_seqlen", max_seqlen)


def _table(table: Tensor, x: Tensor) -> Tensor:
    """A table in a dtype that the op takes."""
    return table if table.dtype in (x.dtype, torch.float32) else table.to(torch.promote_types(x.dtype, torch.float32))


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turns the first rotary_dim columns of x; the others stay.

    Args:
        x: (batch, seqlen, heads, head_dim), or with cu_seqlens (total, heads, head_dim).
        cos, sin: (positions, rotary_dim / 2).
        seqlen_offsets: position of a sequence's first row, one for all or (batch). Default 0.
        cu_seqlens: (batch + 1) int32, where each packed sequence starts, and where the last one ends.
        max_seqlen: with cu_seqlens, an upper bound of the lengths.
        interleaved: pairs are neighbours instead of halves. Default False.
        inplace: writes into x. Default False.
        conjugate: turns back. Default False.

    Returns:
        x turned, of x's shape and dtype; x itself where inplace.

    Raises:
        ValueError: shapes that do not fit, or fewer positions than rows.
        RuntimeError: dtypes or devices that do not fit. Positions that only a GPU knows are clamped to the tables.
    """
    inplace, conjugate = checks.flag("inplace", inplace), checks.flag("conjugate", conjugate)
    others = seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
    return _apply(("x", "cos", "sin"), x, cos, sin, *others)


def _apply(
    names: Names,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    interleaved: bool,
    inplace: bool,
    conjugate: bool,
) -> Tensor:
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, names)
    interleaved = checks.flag("interleaved", interleaved)
    each = seqlen_offsets.to(torch.int32) if isinstance(seqlen_offsets, Tensor) else None
    starts = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
    offset = 0 if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    cos, sin = _table(cos, x), _table(sin, x)
    if cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    try:
        return turn(x, cos, sin, each, starts, offset, interleaved, conjugate, inplace)
    except RuntimeError as error:
        own = ("x", "cos", "sin", "offset", "offsets")
        checks.rename(error, dict(zip(own, (*names, "seqlen_offsets", "seqlen_offsets"), strict=True)))
        raise


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`apply_rotary` with its arguments in another order."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb  # its older name, which models on the hub import


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`apply_rotary` of (batch, seqlen, heads, head_dim) from position 0 on."""
    return apply_rotary(x, cos, sin, interleaved=interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turns q and k inside qkv, in place.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch, seqlen, num_heads_q + 2 * num_heads_k,
            head_dim).
        cos, sin, cos_k, sin_k: (positions, rotary_dim / 2); for k those of q unless given.
        interleaved, seqlen_offsets: as in `apply_rotary`.
        num_heads_q: heads of q, where heads lie side by side.

    Returns:
        qkv.
    """
    if checks.plain("qkv", qkv).dim() != (5 if num_heads_q is None else 4) or (
        num_heads_q is None and qkv.shape[2] != 3
    ):
        raise ValueError(
            "qkv must be (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads, head_dim) with num_heads_q, "
            f"but has shape {tuple(qkv.shape)}, and num_heads_q is {num_heads_q}"
        )
    if num_heads_q is None:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        num_heads_k = (qkv.shape[2] - checks.integer("num_heads_q", num_heads_q)) // 2
        if num_heads_q < 1 or num_heads_k < 1 or num_heads_q + 2 * num_heads_k != qkv.shape[2]:
            raise ValueError(
                f"num_heads_q must leave as many of qkv's {qkv.shape[2]} heads for k as for v, but is {num_heads_q}"
            )
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]
    others = seqlen_offsets, None, None, interleaved, True, False
    names_k: Names = ("qkv", "cos" if cos_k is None else "cos_k", "sin" if sin_k is None else "sin_k")
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    _check(k, cos_k, sin_k, seqlen_offsets, None, None, names_k)  # before anything is turned
    _apply(("qkv", "cos", "sin"), q, cos, sin, *others)
    _apply(names_k, k, cos_k, sin_k, *others)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turns k inside kv (batch, seqlen, 2, heads, head_dim), in place, and returns kv."""
    if checks.plain("kv", kv).dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be (batch, seqlen, 2, heads, head_dim), but has shape {tuple(kv.shape)}")
    _apply(("kv", "cos", "sin"), kv[:, :, 0], cos, sin, seqlen_offsets, None, None, interleaved, True, False)
    return kv


class RotaryEmbedding(nn.Module):
    """Turns q and k by the angles of their positions, with tables of cos and sin that grow as needed.

    Args:
        dim: rotary_dim, the columns that are turned; even.
        base: of the frequencies, inv_freq[j] = base ** (-2 j / dim). Default 10000.
        interleaved: pairs are neighbours instead of halves. Default False.
        scale_base: with it q grows and k shrinks by scale ** (position / scale_base) (xPos, Sun et al. 2022).
        device: of the buffers.

    Raises:
        ValueError: dim is odd, or a number is not positive.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if checks.integer("dim", dim) < 2 or dim % 2 != 0:
            raise ValueError(f"dim must be even and positive, but is {dim}")
        base, scale_base = checks.number("base", base), checks.optional_number("scale_base", scale_base)
        for name, number in (("base", base), ("scale_base", scale_base)):
            if number is not None and not number > 0.0:
                raise ValueError(f"{name} must be positive, but is {number}")
        interleaved = checks.flag("interleaved", interleaved)
        self.dim, self.base, self.interleaved, self.scale_base = dim, base, interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        columns = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (columns + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return self.base**-exponents

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Tables for positions 0 .. seqlen - 1, unless those that are there serve."""
        old = self._cos_cached
        if (
            old is not None
            and seqlen <= self._seq_len_cached
            and (device is None or old.device == torch.device(device))
            and (dtype is None or old.dtype == dtype)
            and not (self.training and old.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        # A model in bf16 has rounded the buffer, and angles of large positions would be off by whole turns.
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        angles = torch.outer(position, inv_freq.to(position.device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (position - seqlen // 2) / self.scale_base
        scale = self.scale.to(position) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns q and k in place.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch, seqlen, num_heads_q + 2 *
                num_heads_k, head_dim); where kv is given q alone, (batch, seqlen, heads, head_dim).
            kv: (batch, seqlen, 2, heads, head_dim).
            seqlen_offset: position of the first row, one for all or (batch); with (batch) max_seqlen is needed.
            max_seqlen: positions that the tables need at least.
            num_heads_q: heads of q, where the heads of q, k and v lie side by side.

        Returns:
            qkv, or q and kv.
        """
        if checks.plain("qkv", qkv).dim() not in (4, 5) or (kv is not None and qkv.dim() != 4):
            raise ValueError(
                "qkv must be (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads, head_dim) with num_heads_q "
                f"or kv, but has shape {tuple(qkv.shape)}"
            )
        if max_seqlen is not None:
            max_seqlen = _bound(max_seqlen)
        if not isinstance(seqlen_offset, Tensor):
            if checks.integer("seqlen_offset", seqlen_offset) < 0:
                raise ValueError(f"seqlen_offset must be >= 0, but is {seqlen_offset}")
            max_seqlen = max(max_seqlen or 0, qkv.shape[1] + seqlen_offset)
        if max_seqlen is None:
            raise ValueError("max_seqlen is needed where seqlen_offset is a tensor")
        self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        assert cos is not None and sin is not None
        cos_k = cos if self._cos_k_cached is None else self._cos_k_cached
        sin_k = sin if self._sin_k_cached is None else self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        _apply(("qkv", "cos", "sin"), qkv, cos, sin, seqlen_offset, None, None, self.interleaved, True, False)
        return qkv, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
