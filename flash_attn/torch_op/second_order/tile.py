"""The inputs of a part, their tangents, and a tile of scores with its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..arguments import NONE, TOP_LEFT, Options, Tangents, Tensors
from . import dropout
from .parts import Part, blocks


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (..., rows, inner) and (..., inner, columns), of 16 bits summed and returned in float32."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    lead = a.shape[:-2]
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32).unflatten(0, lead)  # type: ignore[call-overload, no-any-return]


Pair = tuple[Tensor, Tensor]


def joined(*pairs: tuple[Tensor | None, Tensor | None]) -> Pair | None:
    """Two tensors whose product a @ b^T is the sum of all pairs' products; of None is zero."""
    given = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(given) <= 1:
        return given[0] if given else None
    a, b = zip(*given, strict=True)
    return torch.cat(a, -1), torch.cat(b, -1)


class Inputs:
    """A part of a call. Query heads that share a key head lie side by side, so that a product has the rows of all.

    (batch, heads_k, group, rows, columns) is the shape of what belongs to queries, (batch, heads_k, rows, columns) of
    what belongs to keys, (batch | 1, heads_k | 1, group | 1, rows | 1, columns | 1) of an additive mask.
    """

    def __init__(self, part: Part, tensors: Tensors, options: Options, lse: Tensor) -> None:
        self.part, self.options = part, options
        self.statistics = lse.dtype
        # On tensor cores p is rounded as in the kernels. float16 would lose small derivatives, and torch's product of
        # 16 bits on the CPU rounds its result.
        self.operands = torch.bfloat16 if tensors.q.is_cuda and tensors.q.dtype == torch.bfloat16 else self.statistics
        first_k = part.k.view(tensors.k)
        self.heads_k = first_k.shape[1]
        self.group = part.q.view(tensors.q).shape[1] // self.heads_k
        self.q, self.k, self.v = self.queries(tensors.q), self.keys(tensors.k), self.keys(tensors.v)
        head_dim = self.q.shape[-1]
        default = 1.0 / math.sqrt(head_dim) if head_dim else 1.0
        self.scale = default if options.softmax_scale is None else options.softmax_scale
        self.lse = self.numbers(lse)
        self.lse = self.lse.masked_fill(self.lse == -math.inf, math.inf)  # of rows that see nothing: every p is 0
        mask = tensors.attn_mask
        self.bias = self.mask(mask) if mask is not None and mask.dtype != torch.bool else None
        self.bool_mask = self.mask(_bool_mask(tensors)) if mask is not None and mask.dtype == torch.bool else None
        self.slopes, self.sinks = self.of_heads(tensors.alibi_slopes), self.of_heads(tensors.sinks)
        self.rng_state = tensors.rng_state
        self._tile = self._tile_size()
        self.total_heads = tensors.q.shape[1 if tensors.q.dim() == 3 or options.heads_first else 2]

    def _tile_size(self) -> tuple[int, int]:
        """Rows and columns. On a GPU launches take longer than small tiles do, on a CPU large ones leave its caches."""
        scores = min(max(1 << 22, 2 * self.q.numel()), 1 << 25) if self.q.is_cuda else 1 << 18
        bits = int(math.log2(max(1, scores * self.q.shape[-2] * self.q.shape[-1] // max(1, self.q.numel()))))
        return 1 << min(max(7, bits // 2), 11), 1 << min(max(7, bits - bits // 2), 11)

    def queries(self, x: Tensor) -> Tensor:
        return self.part.q.view(x).unflatten(1, (self.heads_k, self.group)).to(self.operands)

    def keys(self, x: Tensor) -> Tensor:
        return self.part.k.view(x).to(self.operands)

    def views(self, t: Tangents) -> Tangents:
        """Tangents as the inputs are."""
        q, k, v, mask, slopes, sinks = t
        return Tangents(
            None if q is None else self.queries(q),
            None if k is None else self.keys(k),
            None if v is None else self.keys(v),
            None if mask is None else self.mask(mask).to(self.statistics),
            self.of_heads(slopes),
            self.of_heads(sinks),
        )

    def numbers(self, x: Tensor) -> Tensor:
        """(batch, heads_k, group, rows) of a number a row."""
        return self.part.q.numbers(x).unflatten(1, (self.heads_k, self.group))

    def mask(self, x: Tensor) -> Tensor:
        x = x if x.shape[0] == 1 else x[self.part.batch]
        return x.unsqueeze(1) if x.shape[1] == 1 else x.unflatten(1, (self.heads_k, self.group))

    def of_heads(self, x: Tensor | None) -> Tensor | None:
        """(batch | 1, heads_k, group, 1, 1) of slopes or sinks."""
        if x is None:
            return None
        x = x.unsqueeze(0) if x.dim() == 1 else x[self.part.batch]
        return x.unflatten(1, (self.heads_k, self.group))[..., None, None].to(self.statistics)

    def row_blocks(self) -> Iterator[slice]:
        return blocks(self.part.q.length, self._tile[0])

    def tiles(self, rows: slice) -> Iterator[Tile]:
        """Those of some rows in which something may be seen, as far as the host knows."""
        for cols in blocks(self.part.k.length, self._tile[1]):
            tile = Tile(self, rows, cols)
            if tile.exists:
                yield tile


def _bool_mask(tensors: Tensors) -> Tensor:
    mask, packed = tensors.attn_mask, tensors.packed_mask
    assert mask is not None
    if packed is None:
        return mask
    from flash_attn.masks import packed_mask  # which imports the ops

    return packed_mask.unpack(packed, mask.shape)  # what was prepared need not hold the mask itself


class Tile:
    """Scores of some rows and keys; with the hidden ones at -inf.

    Rows and keys of the tile that see nothing and that nobody sees count as zeros, so that what they hold, be it NaN,
    goes nowhere. Time goes into passes over scores, more than into products: what can be is done in place.
    """

    def __init__(self, inputs: Inputs, rows: slice, cols: slice) -> None:
        self.inputs, self.rows, self.cols = inputs, rows, cols
        seen = self._seen_by_position()
        self.exists = seen is not False
        if not self.exists:
            return
        bias = None if inputs.bias is None else self.of_mask(inputs.bias)
        conditions = [] if isinstance(seen, bool) else [seen]
        conditions += [] if inputs.bool_mask is None else [self.of_mask(inputs.bool_mask)]
        conditions += [] if bias is None else [bias != -math.inf]
        self._hidden = self._dead_rows = self._dead_keys = None
        if conditions:
            all_seen = functools.reduce(torch.logical_and, conditions)
            self._hidden = ~all_seen
            self._dead_rows = ~all_seen.any(-1, keepdim=True)
            self._dead_keys = ~all_seen.any(-2).any(2).unsqueeze(-1)
        self.q, self.k, self.v = self.of_queries(inputs.q), self.of_keys(inputs.k), self.of_keys(inputs.v)
        self.kept = self._kept() if inputs.options.dropout_p > 0.0 else None  # dropout's factor
        self.distance = None if inputs.slopes is None else self._offset().abs().to(inputs.statistics)
        # First and second derivative of a score by the product, where there is a softcap.
        self.slope: Tensor | None = None
        self.curvature: Tensor | None = None
        self._score(bias)

    def of_queries(self, x: Tensor) -> Tensor:
        x = x[..., self.rows, :]
        return x if self._dead_rows is None else x.masked_fill(self._dead_rows, 0.0)

    def of_keys(self, x: Tensor) -> Tensor:
        x = x[..., self.cols, :]
        return x if self._dead_keys is None else x.masked_fill(self._dead_keys, 0.0)

    def of_mask(self, x: Tensor) -> Tensor:
        """The tile of a mask, or of what has its shape."""
        x = x if x.shape[-2] == 1 else x[..., self.rows, :]
        return x if x.shape[-1] == 1 else x[..., self.cols]

    def hide_(self, x: Tensor) -> Tensor:
        """`x` without what is not seen, in place."""
        return x if self._hidden is None else x.masked_fill_(self._hidden, 0.0)

    def drop_(self, x: Tensor) -> Tensor:
        """`x` times dropout's factor, in place."""
        return x if self.kept is None else x.mul_(self.kept)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries @ keys^T of the part's rows that belong to queries and to keys."""
        queries = self.of_queries(queries)
        return product(queries.flatten(2, 3), self.of_keys(keys).mT).unflatten(2, queries.shape[2:4])

    def onto_queries(self, x: Tensor, keys: Tensor) -> Tensor:
        """x @ keys, of scores as :meth:`operand` has them: rows that belong to queries."""
        return product(x.flatten(2, 3), keys).unflatten(2, x.shape[2:4])

    def onto_keys(self, x: Tensor, queries: Tensor) -> Tensor:
        """x^T @ queries, over all heads that share keys: rows that belong to these."""
        return product(x.flatten(2, 3).mT, queries.flatten(2, 3))

    def operand(self, x: Tensor) -> Tensor:
        """Scores as an operand of a product."""
        return x.to(self.inputs.operands)

    def probabilities_(self, total: Tensor | None = None) -> Tensor:
        """In place of the scores, which are gone then."""
        p = self.s.sub_(self.inputs.lse[..., self.rows, None]).exp_()
        return p if total is None else p.div_(total[..., None])

    def tangents(self, t: Tangents, of_z: Pair | None) -> tuple[Tensor, Tensor]:
        """Of z = scale * q k^T, and of the scores; without a softcap they may be the same. `t` are as the inputs are,
        `of_z` is what their product is made of."""
        tz = torch.zeros_like(self.s) if of_z is None else self.scores(*of_z).mul_(self.inputs.scale)
        ts = tz if self.slope is None else tz * self.slope
        if t.attn_mask is not None:
            ts += self.of_mask(t.attn_mask)
        if t.alibi_slopes is not None and self.distance is not None:
            ts -= t.alibi_slopes * self.distance
        return tz, self.hide_(ts)

    def _score(self, bias: Tensor | None) -> None:
        inputs, softcap = self.inputs, self.inputs.options.softcap
        s = self.scores(inputs.q, inputs.k).mul_(inputs.scale)
        if softcap > 0.0:
            h = torch.tanh(s / softcap)
            s, self.slope = softcap * h, 1.0 - h * h
            self.curvature = -2.0 / softcap * h * self.slope
        if bias is not None:
            s += bias
        if inputs.slopes is not None and self.distance is not None:
            s -= inputs.slopes * self.distance
        self.s = s if self._hidden is None else s.masked_fill_(self._hidden, -math.inf)

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Of the rows, as a column, and of the keys."""
        device = self.inputs.q.device
        rows, cols = (torch.arange(x.start, x.stop, device=device) for x in (self.rows, self.cols))
        return rows[:, None], cols

    def _diagonal(self) -> Tensor | int:
        """How far right of its own number a row stands: of each sequence where the device alone knows its lengths."""
        q, k = self.inputs.part
        if self.inputs.options.causal == TOP_LEFT:
            return 0
        if q.used is None and k.used is None:
            return k.length - q.length
        rows, cols = (side.length if side.used is None else side.used for side in (q, k))
        return (cols - rows).view(-1, 1, 1, 1, 1)  # type: ignore[union-attr]

    def _offset(self) -> Tensor:
        """Columns from where a row stands to a key."""
        rows, cols = self._numbers()
        return cols - rows - self._diagonal()

    def _seen_by_position(self) -> Tensor | bool:
        """(batch | 1, 1, 1, rows, columns), or for all of them."""
        q, k = self.inputs.part
        options = self.inputs.options
        causal = options.causal != NONE
        left = math.inf if options.window_left < 0 else options.window_left
        right = 0 if causal else math.inf if options.window_right < 0 else options.window_right
        conditions: list[Tensor] = []
        diagonal = self._diagonal()
        if left < math.inf or right < math.inf:
            if isinstance(diagonal, int):
                least = self.cols.start - (self.rows.stop - 1) - diagonal
                most = self.cols.stop - 1 - self.rows.start - diagonal
                if most < -left or least > right:
                    return False
                inside = least >= -left and most <= right
            else:
                inside = False
            if not inside:
                offset = self._offset()
                conditions += [offset >= -left] if left < math.inf else []
                conditions += [offset <= right] if right < math.inf else []
        if q.used is not None or k.used is not None:
            for side, numbers in zip((q, k), self._numbers(), strict=True):
                if side.used is not None:
                    conditions.append(numbers < side.used.view(-1, 1, 1, 1, 1))
        if not conditions:
            return True
        seen = functools.reduce(torch.logical_and, conditions)
        return seen[(None,) * (5 - seen.dim())]

    def _kept(self) -> Tensor:
        inputs = self.inputs
        assert inputs.rng_state is not None
        heads = torch.arange(inputs.total_heads, device=inputs.q.device).view(inputs.heads_k, inputs.group)
        first, last = inputs.part.batch.start, inputs.part.batch.stop
        batch = torch.arange(first, last, device=inputs.q.device)[:, None, None]
        kept, scale = dropout.kept(
            inputs.rng_state, inputs.options.dropout_p, batch * inputs.total_heads + heads, self.rows, self.cols
        )
        return kept.to(inputs.statistics) * scale
