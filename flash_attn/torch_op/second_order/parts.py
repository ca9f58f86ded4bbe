"""A call as parts whose sequences have one length, and how the tensors of a part lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ..arguments import Options, Tensors


class Side(NamedTuple):
    """The rows of q, or those of k and v, that a part has."""

    batch: slice
    rows: slice  # of a packed tensor, or of each sequence
    packed: bool
    used: Tensor | None  # (batch) rows that take part, where only the device knows
    heads_first: bool

    @property
    def length(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def view(self, x: Tensor) -> Tensor:
        """(batch, heads, rows, columns) of q, k, v, or of what has the layout of one of them."""
        if self.packed:
            return x[self.rows].transpose(0, 1).unsqueeze(0)
        return (x if self.heads_first else x.transpose(1, 2))[self.batch, :, self.rows]

    def numbers(self, x: Tensor) -> Tensor:
        """(batch, heads, rows) of lse, or of what has its layout."""
        return x[:, self.rows].unsqueeze(0) if self.packed else x[self.batch, :, self.rows]


class Part(NamedTuple):
    """Sequences that are computed at once."""

    q: Side
    k: Side

    @property
    def batch(self) -> slice:
        """Its entries of masks and slopes."""
        return self.q.batch


def parts(tensors: Tensors, options: Options) -> Iterator[Part]:
    """All sequences at once, or, of packed ones, whose starts are read for it, one after the other."""
    heads_first = options.heads_first
    if tensors.cu_seqlens_q is None and tensors.cu_seqlens_k is None:
        whole = slice(0, tensors.q.shape[0])
        sizes = options.max_seqlen_q, options.max_seqlen_k
        lengths = tensors.seqused_q, tensors.seqused_k
        yield Part(
            *(Side(whole, slice(0, n), False, used, heads_first) for n, used in zip(sizes, lengths, strict=True))
        )
        return
    of_q = _sides(tensors.q, tensors.cu_seqlens_q, tensors.seqused_q, options.max_seqlen_q, heads_first)
    of_k = _sides(tensors.k, tensors.cu_seqlens_k, tensors.seqused_k, options.max_seqlen_k, heads_first)
    yield from itertools.starmap(Part, zip(of_q, of_k, strict=True))


def _sides(
    x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, seqlen: int, heads_first: bool
) -> Iterator[Side]:
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    starts = [0] * batch if cu_seqlens is None else cu_seqlens.tolist()
    used = None if seqused is None else seqused.tolist()
    for i in range(batch):
        length = seqlen if cu_seqlens is None else starts[i + 1] - starts[i]
        rows = slice(starts[i], starts[i] + (length if used is None else used[i]))
        yield Side(slice(i, i + 1), rows, cu_seqlens is not None, None, heads_first)


def blocks(length: int, size: int) -> Iterator[slice]:
    """`length` rows or columns, `size` at a time."""
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))
