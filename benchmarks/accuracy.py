"""Errors of this package's attention and of the others, against float64, on inputs that try a kernel's softmax.

For each head dimension, mask and kind of input the root mean square of the error of out, dq, dk and dv over all seeds;
the ratio is ours over the least of the others'. Kinds: standard normal; q times 30, so that a few keys take everything;
one entry of each row of k that is 30, so that one column of scores dominates; keys that grow along the sequence, so
that the running maximum moves with every block.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import report
import torch
from backends import BACKENDS, Contender, contenders
from inputs import DTYPES, Inputs
from problem import Problem
from torch import Tensor

TENSORS = ("out", "dq", "dk", "dv")


def _outlier(inputs: Inputs) -> None:
    columns = torch.randint(inputs.k.shape[-1], inputs.k.shape[:-1], device=inputs.k.device)
    inputs.k.scatter_(-1, columns[..., None], 30.0)


def _growing(inputs: Inputs) -> None:
    inputs.k *= torch.linspace(0.1, 4, inputs.k.shape[1], device=inputs.k.device)[:, None, None].to(inputs.k.dtype)


KINDS: dict[str, Callable[[Inputs], object]] = {
    "normal": lambda inputs: None,
    "q times 30": lambda inputs: inputs.q.mul_(30),
    "outlier": _outlier,
    "growing keys": _growing,
}


def results(contender: Contender) -> list[Tensor]:
    """out, dq, dk, dv in the layout of `Inputs`."""
    with contender.entered(grad=True):
        out = contender.forward()
        gradients = torch.autograd.grad(out, contender.leaves, contender.dout)
    return [contender.common(x.detach()) for x in (out, *gradients[:3])]


def exact(inputs: Inputs) -> list[Tensor]:
    """The same in float64, by the whole matrix of scores."""
    q, k, v = (x.double().transpose(1, 2).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if inputs.problem.causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -math.inf)
    out = scores.softmax(-1) @ v
    gradients = torch.autograd.grad(out, (q, k, v), inputs.dout.double().transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (out, *gradients)]


def measure(problem: Problem, kind: str, args: argparse.Namespace) -> list[report.Row]:
    """A row for each of out, dq, dk, dv: the error of every backend."""
    squares: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        inputs = Inputs(problem, torch.device(args.device), seed)
        KINDS[kind](inputs)
        truth = exact(inputs)
        for contender in contenders(args.only_backend, inputs, train=True)[0]:
            errors = [float((x.double() - y).square().mean()) for x, y in zip(results(contender), truth, strict=True)]
            sums = squares.setdefault(contender.name, [0.0] * len(TENSORS))
            squares[contender.name] = [a + b / args.seeds for a, b in zip(sums, errors, strict=True)]
    rows = []
    for i, tensor in enumerate(TENSORS):
        rms = {name: math.sqrt(sums[i]) for name, sums in squares.items()}
        others = [error for name, error in rms.items() if name != "ours"]
        ratio = rms["ours"] / min(others) if others and min(others) > 0 else None
        case = {"head_dim": problem.head_dim, "causal": problem.causal, "dtype": problem.dtype, "inputs": kind}
        rows.append({**case, "tensor": tensor, "ratio": ratio, **{f"{n}_rms": e for n, e in rms.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--head-dims", type=int, nargs="+", default=[64, 96, 128, 192, 256], metavar="D")
    add("--dtype", choices=list(DTYPES), nargs="+", default=["bf16"])
    add("--seqlen", type=int, default=1024)
    add("--seeds", type=int, default=4)
    add("--only-backend", choices=BACKENDS, nargs="+", default=["ours", "cudnn", "flash"], metavar="NAME")
    add("--out", type=Path, help="folder for accuracy.json")
    args = parser.parse_args()
    rows: list[report.Row] = []
    for dtype, head_dim, causal in itertools.product(args.dtype, args.head_dims, (False, True)):
        problem = Problem(head_dim, causal, args.seqlen, 1, 4, dtype)
        for kind in KINDS:
            new = measure(problem, kind, args)
            rows += new
            cells = [
                f"{row['tensor']} {row['ours_rms']:.1e}" + (f" x{row['ratio']:.3f}" if row["ratio"] else "")
                for row in new
            ]
            print(f"{problem!s:44} {kind:13} " + "  ".join(cells), flush=True)
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"ours over the least of the others: geometric mean {mean:.3f}, largest {max(ratios):.3f}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"header": report.header(torch.device(args.device)), "rows": rows}
        (args.out / "accuracy.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
