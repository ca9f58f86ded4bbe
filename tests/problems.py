"""Problems over all features at once: what every kernel family is tested on.

A `Problem` is plain data whose repr reproduces it. `check` runs it forward and backward, on any device, and holds the
results against the reference.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from flash_attn.torch_op import attention as ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Where the reference runs for problems on CUDA, unless a test says otherwise: pytest's --reference-device.
reference_device_on_cuda = "cpu"

# What a mask of `Problem.mask_kind` hides.
MASK_KINDS = ("random", "sparse", "documents", "padding", "causal", "window", "prefix", "tree", "lowest")

# Hopper's forward kernels, each full and masked: what FLASH_ATTN_FORWARD_KERNEL takes.
HOPPER_FORWARD = (
    *("d64 256x64", "d64 192x128", "d64 128x128", "d96 192x80", "d96 128x128", "d128 128x128", "d128 192x64"),
    *("d128 192x80", "d192 128x96", "d192/128 128x96", "d256 128x64", "d256/128 128x80"),
    *("d64 cluster 128x128", "d128 cluster 128x128", "d256 cluster 128x64"),
)

# Those that know masks and rules of scores: without an additive mask, and with one.
HOPPER_EXTENDED = ("d64 192x128", "d96 128x128", "d128 128x128", "d192 128x64", "d256 128x64")
HOPPER_BIASED = ("d64 128x128", "d96 128x128", "d128 128x128", "d192 128x64", "d256 128x64")


def forward_head_dims(name: str) -> tuple[int, int]:
    """Of q and of v, from a kernel's name."""
    first, _, second = name.split()[0][1:].partition("/")
    return int(first), int(second or first)


def repr_of_changes(problem: Any) -> str:
    """Of a dataclass: the fields that are not as by default."""
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    changed = [f"{f.name}={fields[f.name]!r}" for f in dataclasses.fields(problem) if fields[f.name] != f.default]
    return f"{type(problem).__name__}({', '.join(changed)})"


@dataclass(frozen=True)
class Problem:
    """One call of `ops.attention` and the backward pass behind it.

    `lengths_q` and `lengths_k` are one length a sequence; without `packed` all are `seqlen_q` and `seqlen_k`.
    `mask` is "", "bool" or "float"; `mask_dims` says which of (batch, heads, rows, columns) are not broadcast.
    `mask_kind` says what it hides; "lowest": as "random", with the dtype's smallest value instead of -inf.
    """

    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 2
    heads_k: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 33
    head_dim: int = 16
    head_dim_v: int = 16
    causal: int = 0
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    mask: str = ""
    mask_dims: tuple[bool, bool, bool, bool] = (True, True, True, True)
    mask_float32: bool = False
    mask_kind: str = "random"
    slopes: str = ""  # "head" or "batch"
    sinks: bool = False
    dropout: float = 0.0
    packed: bool = False
    one_starts: bool = False  # packed, and one tensor of lengths for q and k
    used_q: bool = False
    used_k: bool = False
    layout: str = "dense"  # "heads_first", "qkv" (slices of one tensor), "strided" (last stride is not 1), "misaligned"
    use_lse: bool = False
    frozen: tuple[str, ...] = ()  # inputs that need no gradient
    deterministic: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        return repr_of_changes(self)

    @property
    def is_plain(self) -> bool:
        """No mask, bias, softcap, sink or dropout: what the tensor-core families take first."""
        return not (self.mask or self.softcap or self.slopes or self.sinks or self.dropout)


@dataclass
class Inputs:
    tensors: dict[str, Tensor]  # by the op's names
    options: dict[str, Any]
    leaves: dict[str, Tensor]  # those that get a gradient
    dout: Tensor
    dlse: Tensor | None


def _lengths(generator: random.Random, batch: int, longest: int) -> list[int]:
    lengths = [generator.choice((0, generator.randint(0, longest), longest)) for _ in range(batch)]
    lengths[generator.randrange(batch)] = longest
    return lengths


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values at other strides."""
    if layout == "strided":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "misaligned":
        buffer = x.new_empty(x.numel() + 1)
        return buffer[1:].view(x.shape).copy_(x)
    if layout == "qkv":  # a slice of a tensor three times as wide
        return torch.stack((x, x, x), dim=2)[:, :, 1] if x.dim() == 4 else x
    return x


def _visible(kind: str, shape: list[int], g: torch.Generator) -> Tensor:
    """True where a row sees a column, of a mask of this shape (batch, heads, rows, columns)."""
    i, j = torch.arange(shape[2])[:, None], torch.arange(shape[3])

    def number(high: int) -> Tensor:  # for each batch entry and head
        return torch.randint(0, max(high, 1), (*shape[:2], 1, 1), generator=g)

    if kind in ("sparse", "lowest"):
        return torch.rand(shape, generator=g) < (0.02 if kind == "sparse" else 0.3)
    if kind == "padding":
        left, right = number(shape[3] // 2), number(shape[3] // 2)
        return ((j >= left) & (j < shape[3] - right)).expand(shape)
    if kind == "documents":
        length = number(shape[3]) + 1
        return (i // length == j // length).expand(shape)
    if kind == "window":
        return (i - j).abs().expand(shape) <= number(shape[3] // 4)
    if kind == "prefix":
        return ((j <= i) | (j < number(shape[3]))).expand(shape)
    if kind == "tree":
        return ((i // 8 * 8 == j // 8 * 8) & (j <= i) | (j < shape[3] - shape[2])).expand(shape)
    return (j <= i + number(shape[3] // 4)).expand(shape)


def make_inputs(p: Problem, device: str = "cpu") -> Inputs:
    g = torch.Generator().manual_seed(p.seed)
    lengths = random.Random(p.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths_q = _lengths(lengths, p.batch, p.seqlen_q) if p.packed else [p.seqlen_q] * p.batch
    lengths_k = _lengths(lengths, p.batch, p.seqlen_k) if p.packed else [p.seqlen_k] * p.batch
    if p.packed:  # a few rows at the end belong to no sequence
        shape_q, shape_k = (sum(lengths_q) + lengths.choice((0, 3)),), (sum(lengths_k) + lengths.choice((0, 2)),)
        if p.one_starts:
            lengths_k, shape_k = lengths_q, shape_q
    else:
        shape_q, shape_k = (p.batch, p.seqlen_q), (p.batch, p.seqlen_k)
    leaves: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}

    def add(name: str, short: str, values: Tensor, dtype: torch.dtype) -> None:
        x = values.to(dtype)
        if short in ("q", "k", "v"):
            x = _lay_out(x, p.layout)
        x = x.to(device) if x.device.type != device else x
        if short in ("q", "k", "v") and p.layout in ("strided", "misaligned", "qkv") and device != "cpu":
            x = _lay_out(x, p.layout)
        if x.is_floating_point() and short not in p.frozen:
            x = x.detach().requires_grad_()
            leaves[name] = x
        tensors[name] = x

    heads_first = p.layout == "heads_first"

    def order(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if heads_first else x

    add("q", "q", order(randn(*shape_q, p.heads, p.head_dim)), p.dtype)
    add("k", "k", order(randn(*shape_k, p.heads_k, p.head_dim)), p.dtype)
    add("v", "v", order(randn(*shape_k, p.heads_k, p.head_dim_v)), p.dtype)
    statistics = torch.float64 if p.dtype == torch.float64 else torch.float32
    if p.mask:
        full = (p.batch, p.heads, p.seqlen_q, p.seqlen_k)
        shape = [n if keep else 1 for n, keep in zip(full, p.mask_dims, strict=True)]
        values = randn(*shape)
        dtype = torch.float32 if p.mask_float32 else p.dtype
        if p.mask_kind == "random":
            visible = values > -0.5 if p.mask == "bool" else randn(*shape) <= 1.0
        else:
            visible = _visible(p.mask_kind, shape, g)
        if p.mask == "bool":
            tensors["attn_mask"] = visible.to(device)
        else:
            hidden = torch.finfo(dtype).min if p.mask_kind == "lowest" else float("-inf")
            add("attn_mask", "mask", values.masked_fill(~visible, hidden), dtype)
    if p.slopes:
        shape_slopes = (p.batch, p.heads) if p.slopes == "batch" else (p.heads,)
        add("alibi_slopes", "slopes", randn(*shape_slopes).abs() * 0.2, statistics)
    if p.sinks:
        add("sinks", "sinks", randn(p.heads), statistics)
    if p.packed:
        tensors["cu_seqlens_q"] = _starts(lengths_q).to(device)
        tensors["cu_seqlens_k"] = tensors["cu_seqlens_q"] if p.one_starts else _starts(lengths_k).to(device)
    for name, used, all_lengths in (("seqused_q", p.used_q, lengths_q), ("seqused_k", p.used_k, lengths_k)):
        if used:
            tensors[name] = torch.tensor([lengths.randint(0, n) for n in all_lengths], dtype=torch.int32).to(device)
    if p.dropout:
        tensors["rng_state"] = torch.randint(-(2**62), 2**62, (2,), generator=g).to(device)
    options = {
        "max_seqlen_q": p.seqlen_q,
        "max_seqlen_k": p.seqlen_k,
        "softmax_scale": p.scale,
        "causal": p.causal,
        "window_left": p.window[0],
        "window_right": p.window[1],
        "softcap": p.softcap,
        "dropout_p": p.dropout,
        "heads_first": heads_first,
        "deterministic": p.deterministic,
    }
    dout = order(randn(*shape_q, p.heads, p.head_dim_v)).to(p.dtype).to(device)
    dlse = None
    if p.use_lse:
        dlse = randn(p.heads, shape_q[0]) if p.packed else randn(p.batch, p.heads, p.seqlen_q)
        dlse = dlse.to(statistics).to(device)
    return Inputs(tensors, options, leaves, dout, dlse)


def _run(
    function: Any, inputs: Inputs, convert: torch.dtype | None = None, device: str | None = None
) -> dict[str, Tensor]:
    """Results and gradients by name. With `convert`, floating inputs are taken to that dtype and to `device` first."""
    tensors, leaves = dict(inputs.tensors), dict(inputs.leaves)
    dout, dlse = inputs.dout, inputs.dlse
    if convert is not None:
        for name, x in tensors.items():
            y = x.detach().to(device)
            tensors[name] = y.to(convert) if y.is_floating_point() else y
            if name in leaves:
                leaves[name] = tensors[name].requires_grad_()
        dout = dout.to(device).to(convert)
        dlse = None if dlse is None else dlse.to(device).to(convert)
    with torch.device(device) if device is not None else nullcontext():
        out, lse = function(**tensors, **inputs.options)
    results = {"out": out, "lse": lse}
    empty = ~torch.isfinite(lse.detach())
    pairs = [(out, dout)] if dlse is None else [(out, dout), (lse, dlse.masked_fill(empty, 0.0))]
    results |= _gradients("d", pairs, leaves)
    if convert == torch.float64:
        # dS = P (dP - delta), and delta = rowsum(dout * out) is taken from the rounded out. That error reaches the
        # gradients as a gradient of lse would, and remains where dP and delta cancel.
        delta = (dout * out.detach()).abs().sum(-1)
        delta = delta.transpose(-1, -2) if not inputs.options["heads_first"] else delta
        weight = torch.finfo(inputs.dout.dtype).eps * delta.masked_fill(empty, 0.0)
        results |= _gradients("noise of d", [(lse, weight)], leaves)
    return results


def run(p: Problem, device: str) -> dict[str, Tensor]:
    """Results and gradients by name, not compared with anything."""
    return _run(ops.attention, make_inputs(p, device))


def _gradients(prefix: str, pairs: list[tuple[Tensor, Tensor]], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = [(output, weight) for output, weight in pairs if output.requires_grad]
    gradients: Any = [None] * len(leaves)
    if pairs and leaves:
        outputs, weights = zip(*pairs, strict=True)
        inputs = list(leaves.values())
        gradients = torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=True)
    return {
        f"{prefix}{name}": torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), gradients, strict=True)
    }


def check_all(problems: Iterable[Problem], device: str, reference_device: str | None = None) -> None:
    """check() of each; the error names every miss, not only the first.

    What a family chosen by FLASH_ATTN_FORCE refuses is passed over, though not all of it.
    """
    failures, checked = [], 0
    for number, problem in enumerate(problems):
        try:
            check(problem, device, reference_device)
            checked += 1
        except Exception as error:
            if "FLASH_ATTN_FORCE" in os.environ and "does not take this problem" in str(error):
                continue
            failures.append(f"problem {number}: {type(error).__name__}: {error}\n{problem!r}")
    assert not failures, f"{len(failures)} problems miss\n" + "\n".join(failures[:20])
    if checked == 0:
        pytest.skip("the forced family refuses every problem")


def check(p: Problem, device: str = "cpu", reference_device: str | None = None) -> None:
    """Raises AssertionError, naming the problem, unless every result and gradient is as near as the dtype allows.

    The reference takes seconds on a CPU for a problem of many rows and heads; `reference_device` may be another.
    """
    if reference_device is None:
        reference_device = reference_device_on_cuda if device == "cuda" else "cpu"
    inputs = make_inputs(p, device)
    got = _run(ops.attention, inputs)
    truth = _run(reference.attention, inputs, torch.float64, reference_device)
    eager = _run(reference.attention, inputs, p.dtype, reference_device)
    try:
        for name, result in got.items():
            expected = truth[name]
            factor = 2.0 if name in ("out", "lse") else 3.0
            # A float32 mask of float64 inputs has a float32 gradient; lse is never rounded to 16 bits.
            dtypes = (result.dtype,) if name == "lse" else (result.dtype, p.dtype)
            dtype = max(dtypes, key=lambda d: torch.finfo(d).eps)
            noise = truth.get(f"noise of {name}")
            if name == "lse":  # the largest score and the logarithm of a sum, each rounded, which may cancel
                noise = torch.tensor(torch.finfo(dtype).eps / 2 * math.log1p(p.seqlen_k))
            reference.assert_close(name, result, expected, eager[name], factor, dtype, noise)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{p!r} on {device}") from None


def replayed(attend: Callable[[Tensor], Tensor], masks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Captures `attend` of the first mask in a CUDA graph, and replays it with each in its place: (mask, result)."""
    mask = masks[0].clone()
    attend(mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(mask)
    for other in masks:
        mask.copy_(other)
        out.zero_()
        graph.replay()
        yield other, out


class CutGradient(torch.autograd.Function):
    """Hands on no gradient, which to autograd is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:  # type: ignore[override]
        return None
