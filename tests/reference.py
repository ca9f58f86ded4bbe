"""Attention written down once, by plain tensor operations with autograd, and the measure of an error.

`attention` in float64 is the truth for every test; in the input dtype ("eager") it is the yardstick: an implementation
that rounds where it must may be about as far from the truth, and no further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def philox4x32(counter: list[Tensor], key: tuple[int, int], rounds: int = 7) -> list[Tensor]:
    """Salmon et al. 2011, section 3.3, on int64 tensors that hold 32-bit words."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = p1[0] ^ c1 ^ k0, p1[1], p0[0] ^ c3 ^ k1, p0[1]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, without overflowing int64."""
    low = (x & 0xFFFF) * constant
    high = (x >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _log_sum_exp(s: Tensor) -> Tensor:
    """torch.logsumexp, but with the right gradient where the sum's logarithm is lost beside scores of -3e38: torch's is
    exp(s - lse), which is 1 there."""
    lse = s.logsumexp(-1)
    lost = s.detach().amax(-1) < -1e30
    if lost.any():
        rows = s.masked_fill(~lost.unsqueeze(-1), 0.0)
        largest = rows.detach().amax(-1, keepdim=True)
        apart = largest.squeeze(-1) + (rows - largest).exp().sum(-1).log()
        lse = torch.where(lost, apart, lse)
    return lse


def dropout_factor(rng_state: Tensor, p: float, batch: int, heads: int, b: int, rows: int, cols: int) -> Tensor:
    """(heads, rows, cols) float64: 0 where sequence b's scores are dropped, else one over the share that is kept."""
    seed, offset = (int(x) & 0xFFFFFFFFFFFFFFFF for x in rng_state.tolist())
    threshold = int(p * 65536 + 0.5)
    down, across = (rows + 15) // 16 * 4, (cols + 15) // 16 * 2
    shape = (heads, down, across, 2)
    counter = [
        torch.arange(2 * across).view(1, 1, across, 2).expand(shape),
        torch.arange(down).view(1, -1, 1, 1).expand(shape),
        (torch.arange(heads) + b * heads).view(-1, 1, 1, 1).expand(shape),
        torch.full(shape, offset & 0xFFFFFFFF),
    ]
    words = torch.stack(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)), dim=-1).flatten(3)
    drawn = words.unsqueeze(-1) >> torch.arange(32) & 1  # (heads, down, across, 8 digits, 32 scores)
    digits = dropout_digits(drawn)
    numbers = (digits << torch.arange(15, -1, -1).view(-1, 1)).sum(-2)
    row, col = torch.arange(rows).view(-1, 1), torch.arange(cols)
    bit = 16 * (col % 2) + 8 * (row % 2) + 4 * (col // 2 % 2) + 2 * (col // 8 % 2) + row // 8 % 2
    number = numbers[:, row // 16 * 4 + row // 2 % 4, col // 16 * 2 + col // 4 % 2, bit]
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return (number >= threshold).double() * scale


def dropout_digits(drawn: Tensor) -> Tensor:
    """(..., 16, 32) binary digits of the scores of a group, of (..., 8, 32) that were drawn."""
    return torch.cat((drawn, drawn.roll(11, -1) ^ drawn.roll(18, -1)), -2)


def _sequences(
    cu_seqlens: Tensor | None, seqused: Tensor | None, batch: int, seqlen: int
) -> Iterator[tuple[int | None, int, int]]:
    """(first packed row or None, rows that take part, rows) of every sequence."""
    for b in range(batch):
        first, length = None, seqlen
        if cu_seqlens is not None:
            first = int(cu_seqlens[b])
            length = int(cu_seqlens[b + 1]) - first
        yield first, length if seqused is None else int(seqused[b]), length


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    rng_state: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: int = 0,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    heads_first: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`flash_attn.torch_op.attention.attention`, in the dtype of q, with the whole score matrix in memory."""
    if heads_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    heads, heads_k = q.shape[-2], k.shape[-2]
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.numel() - 1 if cu_seqlens_q is not None else q.shape[0]
    head_dim = q.shape[-1]
    scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(head_dim) if head_dim else 1.0
    group = heads // heads_k if heads_k else 1
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = q.new_full((heads, q.shape[0]) if packed else (batch, heads, q.shape[1]), -math.inf)
    outs, lses = [], []
    rows = list(_sequences(cu_seqlens_q, seqused_q, batch, 0 if packed else q.shape[1]))
    cols = list(_sequences(cu_seqlens_k, seqused_k, batch, 0 if cu_seqlens_k is not None else k.shape[1]))
    for b, ((q_first, n_q, _q), (k_first, n_k, _k)) in enumerate(zip(rows, cols, strict=True)):
        qb = (q[b] if q_first is None else q[q_first:])[:n_q].transpose(0, 1)  # (heads, n_q, head_dim)
        kb, vb = (
            (x[b] if k_first is None else x[k_first:])[:n_k].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v)
        )
        s = qb @ kb.transpose(-1, -2) * scale
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        diagonal = 0 if causal == 1 else n_k - n_q
        i, j = torch.arange(n_q).view(-1, 1) + diagonal, torch.arange(n_k)
        see = torch.ones(n_q, n_k, dtype=torch.bool)
        if attn_mask is not None:
            mask = attn_mask[b if attn_mask.shape[0] > 1 else 0]
            mask = mask[:, : max(n_q, 1) if mask.shape[1] == 1 else n_q, : max(n_k, 1) if mask.shape[2] == 1 else n_k]
            if mask.dtype == torch.bool:
                see = see & mask
            else:
                s = s + mask.to(s.dtype)
        if alibi_slopes is not None:
            slopes = alibi_slopes[b] if alibi_slopes.dim() == 2 else alibi_slopes
            s = s - slopes.to(s.dtype).view(-1, 1, 1) * (i - j).abs()
        if causal:
            see = see & (j <= i)
        if window_left >= 0:
            see = see & (j >= i - window_left)
        if window_right >= 0 and not causal:
            see = see & (j <= i + window_right)
        s = s.masked_fill(~see, -math.inf)
        sink = q.new_empty((heads, n_q, 0))
        if sinks is not None:
            sink = sinks.to(s.dtype).view(-1, 1, 1).expand(heads, n_q, 1)
        everything = torch.cat((s, sink), dim=-1)
        empty = (everything == -math.inf).all(-1) if everything.shape[-1] else torch.ones(heads, n_q, dtype=torch.bool)
        # Rows that see nothing are computed from zeros and then replaced, so that no NaN enters a gradient.
        safe = everything.masked_fill(empty.unsqueeze(-1), 0.0) if everything.shape[-1] else q.new_zeros(heads, n_q, 1)
        p = safe.softmax(-1)[..., :n_k] if everything.shape[-1] else q.new_zeros(heads, n_q, 0)
        if dropout_p > 0:
            assert rng_state is not None
            p = p * dropout_factor(rng_state.cpu(), dropout_p, batch, heads, b, n_q, n_k).to(p.dtype)
        p = p.masked_fill(empty.unsqueeze(-1), 0.0)
        dead = ~((see & (s > -math.inf)) | s.isnan()).any(1) if n_q else torch.ones(heads, n_k, dtype=torch.bool)
        vb = vb.masked_fill(dead.unsqueeze(-1), 0.0)  # a key that no query sees is never read
        outs.append((p @ vb).transpose(0, 1))
        lses.append(_log_sum_exp(safe).masked_fill(empty, -math.inf))
    for b, (q_first, n_q, _n) in enumerate(rows):
        index = torch.arange(n_q) + (q_first or 0)
        if packed:
            out = out.index_put((index,), outs[b])
            lse = lse.index_put((torch.arange(heads).view(-1, 1), index), lses[b])
        else:
            where = (torch.full((n_q,), b), index)
            out = out.index_put(where, outs[b])
            lse = lse.index_put((torch.tensor(b), torch.arange(heads).view(-1, 1), index), lses[b])
    return (out.transpose(1, 2) if heads_first else out), lse


# Beside the eager error, as a share of the largest entry: a rounding of the result and of its terms. That of float32
# also covers that backward recomputes P from an lse rounded to float32, which at scores in the hundreds costs several
# units in the last place; without that it could be a tenth.
FLOOR = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-4, torch.bfloat16: 1.6e-3}


def assert_close(
    name: str,
    got: Tensor,
    truth: Tensor,
    eager: Tensor,
    factor: float,
    dtype: torch.dtype,
    noise: Tensor | None = None,
) -> None:
    """`got` is as near to `truth` as `factor` times the eager result is, plus a floor; NaN and infinities agree.

    Errors are measured at the coordinate where they are largest; the floor is relative to the largest entry of the
    truth. `noise` is a further error that no implementation can avoid, of which twice the largest entry is allowed.
    """
    got, truth, eager = (x.detach().cpu().double() for x in (got, truth, eager))
    assert got.shape == truth.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(got) != test(truth)
        if differs.any():
            where = tuple(int(i) for i in differs.nonzero()[0])
            raise AssertionError(f"{name}{list(where)}: {what} expected {test(truth)[where]}, got {got[where]}")
    finite = torch.isfinite(truth)
    error = torch.where(finite, (got - truth).abs(), 0.0)
    yardstick = torch.where(finite & torch.isfinite(eager), (eager - truth).abs(), 0.0).max()
    scale = torch.where(finite, truth.abs(), 0.0).max()
    allowed = factor * float(yardstick) + FLOOR[dtype] * float(scale) + 1e-30
    if noise is not None:
        allowed += 2 * float(noise.detach().nan_to_num(0.0, 0.0, 0.0).abs().max())
    if float(error.max()) > allowed:
        where = tuple(int(i) for i in (error == error.max()).nonzero()[0])
        raise AssertionError(
            f"{name}{list(where)}: expected {truth[where]:.9g}, got {got[where]:.9g}; error {error.max():.3g}, allowed "
            f"{allowed:.3g} (eager {dtype} has {yardstick:.3g}, largest entry {scale:.3g})"
        )
