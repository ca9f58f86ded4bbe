"""Whether results are right, asked before anything is timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from backends import Contender, ours
from inputs import Inputs
from problem import SOFTCAP
from torch import Tensor

TOLERANCE = {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-3}  # relative, of the norm
DROPOUT_TOLERANCE = 2e-2  # of the mean over all elements, if there are many
PAGED = ("paged16", "paged64", "paged256")
OURS = ("ours", "deterministic", "rule", *PAGED)
NAMES = ("out", "dq", "dk", "dv", "dmask")


def results(contender: Contender, train: bool) -> list[Tensor]:
    """out, and dq, dk, dv in the layout of `Inputs`, and the gradient of the mask if it has one."""
    with contender.entered(grad=train):
        out = contender.forward()
        gradients = torch.autograd.grad(out, contender.leaves, contender.dout) if train else ()
    values = [contender.common(x.detach()).float() for x in (out, *gradients[:3])]
    return [*values, *(x.float() for x in gradients[3:])]


def first_head(x: Tensor, inputs: Inputs) -> Tensor:
    """Of the last sequence, (seqlen, head_dim)."""
    lengths = inputs.problem.lengths
    return (x[-lengths[-1] :] if lengths else x[-1])[:, 0]


def eager(inputs: Inputs, train: bool) -> list[Tensor]:
    """What `results` has of the last sequence's first head, in float32 by the whole matrix of its scores."""
    p = inputs.problem
    q, k, v = (first_head(x, inputs).float() for x in (inputs.q, inputs.k, inputs.v))
    if p.filled:
        k, v = k[: p.filled[-1]], v[: p.filled[-1]]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    i, j = (torch.arange(len(x), device=inputs.device) for x in (q, k))
    i = i[:, None] + (len(k) - len(q) if p.seqlen_k else 0)
    with torch.enable_grad():
        scores = q @ k.T / math.sqrt(p.head_dim)
        if p.score == "softcap":
            scores = SOFTCAP * (scores / SOFTCAP).tanh()
        if p.score == "alibi":
            scores = scores - inputs.slopes[0] * (i - j).abs()
        if inputs.mask is not None:
            mask = inputs.mask.detach().expand(p.batch, p.heads, -1, -1)[-1, 0]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        if p.causal:
            hidden = i < j if p.window < 0 else (i < j) | (i - j > p.window)
            scores = scores.masked_fill(hidden, -math.inf)
        out = scores.softmax(-1) @ v
    if not train:
        return [out.detach()]
    gradients = torch.autograd.grad(out, (q, k, v), first_head(inputs.dout, inputs).float())
    return [out.detach(), *(gradients if p.kv_heads == p.heads else gradients[:1])]


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, other: str) -> str:
    worst = 0.0
    for name, a, b in zip(NAMES, found, expected, strict=False):
        difference = float((a - b).norm() / b.norm())
        if not difference <= tolerance:
            raise SystemExit(f"WRONG RESULT: {name} of ours and of {other} differ by {difference:.1e}")
        worst = max(worst, difference)
    return f"{worst:.0e} from {other}"


def _check_dropout(mine: Contender, inputs: Inputs, train: bool) -> str:
    """Every result is linear in the random mask, so its mean is the result without dropout. Of as many elements the
    part of one result along the other is nearly its mean."""
    plain = copy.copy(inputs)
    plain.problem = replace(inputs.problem, score="none")
    tolerance = DROPOUT_TOLERANCE + 2 / math.sqrt(inputs.problem.tokens * inputs.problem.heads)
    worst = 0.0
    for name, a, b in zip(NAMES, results(mine, train), results(ours(plain), train), strict=False):
        difference = abs(float((a * b).sum() / b.square().sum()) - 1)
        if not difference <= tolerance or torch.equal(a, b):
            raise SystemExit(f"WRONG RESULT: the mean of {name} with dropout is {difference:.1e} from that without")
        worst = max(worst, difference)
    return f"mean {worst:.0e} from that without dropout"


def check(able: list[Contender], inputs: Inputs, train: bool) -> str:
    """Compares ours with the first other one, without any with a head in float32; with dropout its mean with the result
    without. Raises if they differ by more than the dtype explains.

    Returns:
        The largest relative difference, in words.
    """
    mine = next((contender for contender in able if contender.name == "ours"), None)
    other = next((contender for contender in able if contender.name not in OURS), None)
    problem = inputs.problem
    tolerance = TOLERANCE[problem.dtype]
    if mine is None:
        return "ours did not run"
    if problem.score == "dropout":
        return _check_dropout(mine, inputs, train)
    for paged in (contender for contender in able if contender.name in PAGED):
        _compare(results(paged, train), results(mine, train), tolerance, "of it in pages")
    if other is not None:
        return _compare(results(mine, train), results(other, train), tolerance, other.name)
    found = [first_head(x, inputs) for x in results(mine, train)[: 4 if train else 1]]
    return _compare(found, eager(inputs, train), tolerance, "a head in float32")
