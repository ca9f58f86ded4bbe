"""`flash_attn::forward_jvp` and `flash_attn::backward_jvp`: tangents of attention and of its gradients.

With x = (q, k, v, bias, slopes, sinks), t its tangents, z = scale q k^T, s = c(z) + bias - slope distance where c is
the softcap, p = exp(s - lse), P[sink] = exp(sink - lse) and `kept` dropout's factor, of each row and key:

    ts   = c'(z) tz + tbias - tslope distance,  tz = scale (tq k + q tk)
    tlse = sum p ts + P[sink] tsink
    tout = sum kept p (ts v + tv) - tlse out

Of the gradients, with u = kept dout v, delta = dout out - dlse and e = p (u - delta), the gradient of a score, by which
dq = scale c' e k, dk = scale (c' e)^T q, dv = (kept p)^T dout, dbias = e, dslope = -sum e distance and
dsink = -sum P[sink] delta:

    tu     = kept (dout tv + tdout v)
    tdelta = dout tout + tdout out - tdlse
    te     = e (ts - tlse) + p (tu - tdelta)
    tdq    = scale (tg k + g tk),  g = c' e,  tg = c' te + c'' tz e
    tdk    = scale (tg^T q + g^T tq)
    tdv    = (kept p (ts - tlse))^T dout + (kept p)^T tdout
    tdbias = te,  tdslope = -sum te distance,  tdsink = -sum P[sink] ((tsink - tlse) delta + tdelta)

These are the product rule on the formulas of Dao et al. 2022 (arXiv:2205.14135, appendix B.4). Gradient . t, for fixed
cotangents (dout, dlse), is their product with (tout, tlse). So the gradient of gradients, for cotangents t of them, is
(tout, tlse) for (dout, dlse), and for x what backward_jvp gives without tdout and tdlse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import private
from ..arguments import Options, Tangents, Tensors
from ..library import empty_gradients, empty_outputs
from .parts import parts
from .tile import Inputs, joined


def forward_jvp(t: Tangents, tensors: Tensors, out: Tensor, lse: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(tout, tlse), laid out as out and lse, which are what the forward pass returned."""
    tout, tlse = empty_outputs(tensors.q, tensors.v, options.heads_first, tensors.cu_seqlens_q is not None)
    with _plainly():
        tout.zero_()
        tlse.zero_()
        for inputs in _parts(tensors, options, lse):
            side = inputs.part.q
            _forward_jvp(inputs, inputs.views(t), inputs.queries(out), side.view(tout), side.numbers(tlse))
    return tout, tlse


def backward_jvp(
    dout: Tensor,
    dlse: Tensor | None,
    tdout: Tensor | None,
    tdlse: Tensor | None,
    t: Tangents,
    tensors: Tensors,
    out: Tensor,
    lse: Tensor,
    tout: Tensor | None,
    tlse: Tensor | None,
    needs: Sequence[bool],
    options: Options,
) -> tuple[Tensor | None, ...]:
    """Tangents of the gradients that are needed, laid out as these. tout and tlse are those of out and lse; a tangent
    that is None is zero."""
    results = empty_gradients(tensors, needs)
    with _plainly():
        for x in results:
            if x is not None:
                x.zero_()
        dmask = results[3]
        sums = None if dmask is None else torch.zeros_like(dmask, dtype=lse.dtype)
        for inputs in _parts(tensors, options, lse):
            rows = _Rows.of(inputs, dout, dlse, tdout, tdlse, out, tout, tlse)
            _backward_jvp(inputs, inputs.views(t), rows, _Gradients.of(inputs, (*results[:3], sums, *results[4:])))
        if dmask is not None and sums is not None:
            dmask.copy_(sums)
    return results


@contextmanager
def _plainly() -> Iterator[None]:
    """What a caller has switched on for the ops that it calls is not for those within one."""
    with torch.no_grad(), private.without_torch_function(), private.without_autocast():
        yield


def _parts(tensors: Tensors, options: Options, lse: Tensor) -> Iterator[Inputs]:
    if lse.numel() > 0:
        for part in parts(tensors, options):
            yield Inputs(part, tensors, options, lse)


def _forward_jvp(inputs: Inputs, t: Tangents, out: Tensor, tout: Tensor, tlse: Tensor) -> None:
    of_z = joined((t.q, inputs.k), (inputs.q, t.k))
    for rows in inputs.row_blocks():
        total = _total(inputs, rows)
        tsum = torch.zeros_like(inputs.lse[..., rows])
        acc = torch.zeros_like(out[..., rows, :], dtype=inputs.statistics)
        # ts counts from its mean over a row's first tile, so that what all its keys have in common is not rounded.
        center = torch.zeros_like(tsum)
        for i, tile in enumerate(inputs.tiles(rows)):
            (_, ts), p = tile.tangents(t, of_z), tile.probabilities_(total)
            if i == 0:
                weight = p.sum(-1)
                center = torch.where(weight > 0.0, (p * ts).sum(-1) / weight, 0.0)
            ps = ts.sub_(center[..., None]).mul_(p)
            tsum += ps.sum(-1)
            acc += tile.onto_queries(tile.operand(tile.drop_(ps)), tile.v)
            if t.v is not None:
                acc += tile.onto_queries(tile.operand(tile.drop_(p)), tile.of_keys(t.v))
        if inputs.sinks is not None:
            of_sink = 0.0 if t.sinks is None else t.sinks[..., 0]
            tsum += _p_of_sink(inputs, rows, total) * (of_sink - center)
        acc -= tsum[..., None] * out[..., rows, :]
        tout[..., rows, :] = acc.flatten(1, 2)
        tlse[..., rows] = (tsum + center).flatten(1, 2)


class _Rows(NamedTuple):
    """What backward_jvp knows of each row."""

    dout: Tensor
    tdout: Tensor | None
    delta: Tensor
    tdelta: Tensor
    tlse: Tensor

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        dout: Tensor,
        dlse: Tensor | None,
        tdout: Tensor | None,
        tdlse: Tensor | None,
        out: Tensor,
        tout: Tensor | None,
        tlse: Tensor | None,
    ) -> _Rows:
        def dot(a: Tensor | None, b: Tensor | None) -> Tensor:
            if a is None or b is None:
                return torch.zeros_like(inputs.lse)
            return (inputs.queries(a).to(inputs.statistics) * inputs.queries(b)).sum(-1)

        def number(x: Tensor | None) -> Tensor:
            return torch.zeros_like(inputs.lse) if x is None else inputs.numbers(x)

        return cls(
            inputs.queries(dout),
            None if tdout is None else inputs.queries(tdout),
            dot(dout, out) - number(dlse),
            dot(dout, tout) + dot(tdout, out) - number(tdlse),
            number(tlse),
        )


class _Gradients(NamedTuple):
    """Where the tangents of a part's gradients go, as its inputs lie; None: not needed."""

    q: Tensor | None  # (batch, heads, rows, columns)
    k: Tensor | None
    v: Tensor | None
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs, results: Sequence[Tensor | None]) -> _Gradients:
        q, k, v, mask, slopes, sinks = results
        return cls(
            None if q is None else inputs.part.q.view(q),
            None if k is None else inputs.part.k.view(k),
            None if v is None else inputs.part.k.view(v),
            None if mask is None else inputs.mask(mask),
            inputs.of_heads(slopes),
            inputs.of_heads(sinks),
        )


def _backward_jvp(inputs: Inputs, t: Tangents, whole: _Rows, gradients: _Gradients) -> None:
    of_z, of_u = joined((t.q, inputs.k), (inputs.q, t.k)), (whole.dout, inputs.v)
    of_tu = joined((whole.dout, t.v), (whole.tdout, inputs.v))
    needs_q, needs_k, needs_v = (x is not None for x in gradients[:3])
    dk, dv = (torch.zeros_like(x, dtype=inputs.statistics) for x in (inputs.k, inputs.v))
    for rows in inputs.row_blocks():
        total = _total(inputs, rows)
        delta, tdelta, tlse = (x[..., rows] for x in whole[2:])
        dq = torch.zeros_like(inputs.q[..., rows, :], dtype=inputs.statistics)
        for tile in inputs.tiles(rows):
            dout = tile.of_queries(whole.dout)
            tdout = None if whole.tdout is None else tile.of_queries(whole.tdout)
            (tz, ts), p = tile.tangents(t, of_z), tile.probabilities_(total)
            ts = tile.hide_(ts.sub_(tlse[..., None]))
            e = tile.hide_(tile.drop_(tile.scores(*of_u)).sub_(delta[..., None]).mul_(p))
            tu = torch.zeros_like(p) if of_tu is None else tile.drop_(tile.scores(*of_tu))
            te = tile.hide_(tu.sub_(tdelta[..., None]).mul_(p)).addcmul_(e, ts)
            if gradients.attn_mask is not None:
                _add_to(tile.of_mask(gradients.attn_mask), te)
            if gradients.alibi_slopes is not None and tile.distance is not None:
                _add_to(gradients.alibi_slopes, -te * tile.distance)
            g, tg = e, te
            if tile.slope is not None and tile.curvature is not None:
                g, tg = tile.slope * e, tile.slope * te + tile.curvature * tz * e
            g, tg = tile.operand(g), tile.operand(tg)
            if needs_q:
                dq += tile.onto_queries(tg, tile.k)
                if t.k is not None:
                    dq += tile.onto_queries(g, tile.of_keys(t.k))
            if needs_k:
                dk[..., tile.cols, :] += tile.onto_keys(tg, tile.q)
                if t.q is not None:
                    dk[..., tile.cols, :] += tile.onto_keys(g, tile.of_queries(t.q))
            if needs_v:
                dv[..., tile.cols, :] += tile.onto_keys(tile.operand(tile.drop_(ts.mul_(p))), dout)
            if needs_v and tdout is not None:
                dv[..., tile.cols, :] += tile.onto_keys(tile.operand(tile.drop_(p)), tdout)
        if gradients.q is not None:
            gradients.q[..., rows, :] = (dq * inputs.scale).flatten(1, 2)
        if gradients.sinks is not None:
            of_sink = 0.0 if t.sinks is None else t.sinks[..., 0]
            p = _p_of_sink(inputs, rows, total)
            of_rows = torch.where(p > 0.0, p * ((of_sink - tlse) * delta + tdelta), 0.0)
            _add_to(gradients.sinks, -of_rows[..., None])
    if gradients.k is not None:
        gradients.k[:] = dk * inputs.scale
    if gradients.v is not None:
        gradients.v[:] = dv


def _add_to(sums: Tensor, x: Tensor) -> None:
    sums += x.sum_to_size(sums.shape)


def _total(inputs: Inputs, rows: slice) -> Tensor | None:
    """Sum of p of each row. None for 1, as it is unless an additive mask has made scores so large that lse, beside
    them, loses the logarithm of what they are counted by."""
    if inputs.bias is None:
        return None
    total = torch.zeros_like(inputs.lse[..., rows])
    for tile in inputs.tiles(rows):
        total += tile.probabilities_().sum(-1)
    if inputs.sinks is not None:
        total += _p_of_sink(inputs, rows)
    return torch.where(total == 0.0, 1.0, total)


def _p_of_sink(inputs: Inputs, rows: slice, total: Tensor | None = None) -> Tensor:
    assert inputs.sinks is not None
    p = torch.exp(inputs.sinks[..., 0] - inputs.lse[..., rows])
    return p if total is None else p / total
