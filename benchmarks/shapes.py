"""The problems that are measured."""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from problem import CASES, MASKS, SCORES, Problem


@dataclass(frozen=True)
class Selection:
    """What the command line leaves of a suite; None leaves everything."""

    on_cuda: bool
    head_dims: Sequence[int] | None = None
    causal: Sequence[bool] | None = None
    seqlens: Sequence[int] | None = None
    dtypes: Sequence[str] | None = None
    cases: Sequence[str] | None = None
    count: int = 20
    seed: int = 0

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--head-dims", type=int, nargs="+", metavar="D")
        add("--seqlens", type=int, nargs="+", metavar="S")
        add("--causal", choices=["full", "causal", "both"], default="both")
        add("--dtype", choices=["bf16", "fp16", "fp32"], nargs="+", help="default: what the suite says")
        add("--case", dest="cases", choices=CASES, nargs="+", metavar="CASE", help=f"mask or score: {', '.join(CASES)}")
        add("--count", type=int, default=20, help="problems of the sweep suite (default 20)")
        add("--seed", type=int, default=0, help="of the sweep's and varlen's random sizes")

    @classmethod
    def of_arguments(cls, args: argparse.Namespace) -> Selection:
        """`args.device` is "cpu" or "cuda"."""
        causal = {"full": (False,), "causal": (True,), "both": None}[args.causal]
        sizes = args.head_dims, causal, args.seqlens, args.dtype, args.cases
        return cls(args.device == "cuda", *sizes, args.count, args.seed)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of a suite is left out."""
        return all(x is None for x in (self.head_dims, self.causal, self.seqlens, self.dtypes, self.cases))

    def apply(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems of the chosen sizes, each in every chosen dtype."""
        kept = [
            problem
            for problem in problems
            if (self.head_dims is None or problem.head_dim in self.head_dims)
            and (self.causal is None or problem.causal in self.causal)
            and (self.seqlens is None or problem.seqlen in self.seqlens)
            and (self.cases is None or problem.case in self.cases)
        ]
        if self.dtypes is None:
            return kept
        return list(dict.fromkeys(replace(problem, dtype=dtype) for dtype in self.dtypes for problem in kept))


def peers(selection: Selection) -> list[Problem]:
    """On CUDA 16,384 tokens and 2,048 features a call, as other projects publish; on the CPU sizes that it can take.

    Head dimensions and lengths that the command line names are added.
    """
    if selection.on_cuda:
        return [
            Problem(head_dim, causal, seqlen, max(1, 16384 // seqlen), max(1, 2048 // head_dim))
            for head_dim in selection.head_dims or (64, 128, 256)
            for causal in (False, True)
            for seqlen in selection.seqlens or (512, 1024, 2048, 4096, 8192, 16384)
        ]
    sizes = ((8, 8, 256, 64), (8, 8, 256, 32), (4, 16, 1024, 128), (1, 8, 2048, 80), (1, 8, 4096, 64))
    return [
        Problem(head_dim, causal, seqlen, batch, heads, dtype)
        for dtype in ("fp32", "bf16")
        for batch, heads, seqlen, head_dim in sizes
        for causal in (False, True)
    ]


def sweep(selection: Selection) -> list[Problem]:
    """Random problems of every kind of length, 128 to 20,000 (on the CPU 16 to 1,024), most of no round size."""
    chance = random.Random(selection.seed)
    tokens, shortest, longest = (16384, 128, 20_000) if selection.on_cuda else (1024, 16, 1024)
    problems = []
    for _ in range(selection.count):
        seqlen = int(shortest * (longest / shortest) ** chance.random())
        problems.append(
            Problem(
                head_dim=chance.choice((32, 40, 64, 80, 96, 112, 128, 160, 192, 256)),
                causal=chance.random() < 0.5,
                seqlen=seqlen,
                batch=max(1, int(tokens / seqlen * chance.uniform(0.3, 1))),
                heads=chance.choice((1, 2, 4, 8, 16, 32)),
                dtype=chance.choice(("bf16", "bf16", "fp16") if selection.on_cuda else ("bf16", "fp32")),
            )
        )
    return problems


def varlen(selection: Selection) -> list[Problem]:
    """Packed sequences: of one length, of random lengths, one long among short ones, and 64 of 128 to 8,192 (on the CPU
    16 of 16 to 512); and, to compare the rates, one dense batch of about as many FLOPs a token as the last."""
    total = 16384 if selection.on_cuda else 2048
    count, spread = (64, (7, 13)) if selection.on_cuda else (16, (4, 9))
    chance = random.Random(selection.seed)
    cuts = sorted(chance.sample(range(1, total), 15))
    mixes = (
        (total // 8,) * 8,
        tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)),
        (total // 2, *(total // 64,) * 32),
        tuple(int(2 ** chance.uniform(*spread)) for _ in range(count)),
    )
    problems = []
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        heads = 2048 // head_dim
        problems += [
            Problem(head_dim, causal, max(lengths), len(lengths), heads, _dtype(selection), lengths=lengths)
            for lengths in mixes
        ]
        problems.append(Problem(head_dim, causal, total // 4, 4, heads, _dtype(selection)))
    return problems


def gqa(selection: Selection) -> list[Problem]:
    """Fewer heads of keys and values, beside as many."""
    seqlen, batch = (4096, 4) if selection.on_cuda else (512, 2)
    return [
        Problem(head_dim, causal, seqlen, batch, heads, _dtype(selection), heads_k=heads // group if group > 1 else 0)
        for head_dim, heads in ((64, 32), (128, 16), (256, 8))
        for causal in (False, True)
        for group in (1, 4, 8)
    ]


def few(selection: Selection) -> list[Problem]:
    """Fewer tiles than a large GPU has SMs: one short sequence, one long head, many queries on few keys."""
    if not selection.on_cuda:
        return [Problem(64, False, 1024, 1, heads, "fp32", seqlen_k=77) for heads in (1, 8)]
    short = ((512, 8), (1024, 4), (1024, 8), (2048, 4), (4096, 1), (16384, 1))
    crossing = ((1024, 1), (4096, 1), (4096, 4), (4096, 16))
    problems = []
    for head_dim in (64, 128, 256):
        problems += [Problem(head_dim, causal, seqlen, 1, heads) for causal in (False, True) for seqlen, heads in short]
        problems += [Problem(head_dim, False, seqlen, batch, 8, seqlen_k=77) for seqlen, batch in crossing]
    return problems


def deterministic(selection: Selection) -> list[Problem]:
    """What repeatable gradients cost: see backward."""
    if not selection.on_cuda:
        return [Problem(64, causal, 512, 2, 8, "fp32") for causal in (False, True)]
    return [
        Problem(head_dim, causal, seqlen, 16384 // seqlen, 2048 // head_dim)
        for head_dim in (64, 96, 128, 192, 256)
        for causal in (False, True)
        for seqlen in (512, 1024, 4096, 16384)
    ]


def window(selection: Selection) -> list[Problem]:
    """Causal sliding windows, and none."""
    seqlen, windows = (16384, (256, 1024, 4096, -1)) if selection.on_cuda else (2048, (128, 512, -1))
    return [
        Problem(head_dim, True, seqlen, 1, 2048 // head_dim, _dtype(selection), window=width)
        for head_dim in (64, 128, 256)
        for width in windows
    ]


def mask(selection: Selection) -> list[Problem]:
    """Dense masks and biases, and what changes scores: dropout, softcap, ALiBi."""
    batch, seqlen, width = (4, 4096, 2048) if selection.on_cuda else (2, 512, 512)
    problems = []
    for head_dim in selection.head_dims or (64, 128, 256):
        plain = Problem(head_dim, False, seqlen, batch, width // head_dim, _dtype(selection))
        long = replace(plain, seqlen=4 * seqlen, batch=1)
        tree = replace(plain, seqlen=64, seqlen_k=2 * seqlen)
        shapes = {"window": long, "tree": tree}
        problems += [replace(shapes.get(kind, plain), mask=kind) for kind in MASKS[1:]]
        problems += [replace(plain, score=kind) for kind in SCORES[1:]]
    return problems


def extra(selection: Selection) -> list[Problem]:
    """What peers leaves out. On CUDA fp16 and other head dims; on the CPU masks, fp16, small head dims, one head."""
    if selection.on_cuda:
        sizes = ((128, 16, "fp16"), (64, 32, "fp16"), (96, 21, "bf16"), (192, 10, "bf16"), (256, 8, "fp16"))
        return [
            Problem(head_dim, causal, seqlen, 16384 // seqlen, heads, dtype)
            for head_dim, heads, dtype in sizes
            for causal in (False, True)
            for seqlen in (1024, 8192)
        ]
    masked = [replace(p, mask="random") for p in peers(selection) if not p.causal]
    half = [Problem(64, causal, 1024, 1, 2, "fp16") for causal in (False, True)]
    small = [
        Problem(d, causal, 4096, 1, 8, dtype) for d in (8, 16) for dtype in ("fp32", "bf16") for causal in (False, True)
    ]
    one_head = [Problem(64, causal, 8192, 1, 1, dtype) for dtype in ("fp32", "bf16") for causal in (False, True)]
    return [*masked, *half, *small, *one_head]


def decode(selection: Selection) -> list[Problem]:
    """A few query rows of each of many heads over the keys of a cache: one row over short and long caches, also in
    float8; 2 to 16 rows; sequences of all lengths; other head dimensions; a key head for each query head, and for all;
    values that are a part of the keys.
    """
    if not selection.on_cuda:
        return [Problem(128, False, 1, 1, 8, dtype, seqlen_k=8192) for dtype in ("fp32", "bf16")]
    caches = ((1, 131072, 32), (8, 32768, 32), (64, 4096, 32), (128, 2048, 64), (1, 1024, 32), (8, 1024, 32))
    one = [Problem(128, False, 1, batch, heads, "bf16", 8, seqlen_k=keys) for batch, keys, heads in caches]
    rows = [replace(one[1], seqlen=n, causal=causal) for causal in (False, True) for n in (2, 4, 8, 16)]
    rows += [replace(one[2], seqlen=n) for n in (4, 16)]
    chance = random.Random(selection.seed)
    ragged = Problem(
        128, False, 1, 32, 32, "bf16", 8, seqlen_k=32768, filled=tuple(chance.randint(1, 32768) for _ in range(32))
    )
    float8 = [replace(p, float8=True) for p in (*one, ragged, rows[3])]
    dims = [Problem(d, False, 1, 16, 32, "bf16", 8, seqlen_k=8192) for d in (64, 96, 192, 256)]
    dims += [replace(dims[0], head_dim=128, heads_k=heads_k) for heads_k in (1, 32)]
    latent = [
        Problem(576, False, 1, batch, heads, "bf16", 1, seqlen_k=keys, latent=512)
        for heads, batch, keys in ((16, 16, 8192), (16, 64, 4096), (64, 64, 4096), (128, 128, 4096))
    ]
    return [*one, *rows, ragged, *float8, *dims, *latent]


def fp32(selection: Selection) -> list[Problem]:
    """Single precision; TF32 is off. On CUDA 16,384 tokens a call."""
    sizes = [(16384 // s, 16, s) for s in (512, 1024, 2048, 4096, 8192, 16384)] if selection.on_cuda else [(2, 8, 512)]
    return [
        Problem(d, causal, seqlen, batch, heads, "fp32")
        for d in (64, 128)
        for causal in (False, True)
        for batch, heads, seqlen in sizes
    ]


def host(selection: Selection) -> list[Problem]:
    """Tiny problems: what a call costs the host."""
    small = Problem(64, False, 128, 1, 1, "bf16") if selection.on_cuda else Problem(16, False, 8, 1, 1, "fp32")
    plain = [small, Problem(8, False, 128, 2, 8, "fp32")] if selection.on_cuda else [small]
    return [*plain, *(replace(small, mask=mask) for mask in ("random", "bias_gradient"))]


SUITES: dict[str, Callable[[Selection], list[Problem]]] = {
    suite.__name__: suite
    for suite in (peers, extra, sweep, few, varlen, gqa, window, deterministic, mask, decode, fp32, host)
}


def _dtype(selection: Selection) -> str:
    return "bf16" if selection.on_cuda else "fp32"


def _choices(problems: Sequence[Problem]) -> str:
    """What a suite has of each thing that the command line selects by."""

    def listed(values: Iterable[object]) -> str:
        return ", ".join(map(str, dict.fromkeys(values)))

    head_dims, lengths = listed(sorted(p.head_dim for p in problems)), listed(sorted(p.seqlen for p in problems))
    masks = listed("causal" if p.causal else "full" for p in problems)
    return f"head dims {head_dims}; lengths {lengths}; {masks}; cases {listed(p.case for p in problems)}"


def problems_of(suite: str, selection: Selection) -> list[Problem]:
    """The problems of a suite that the command line asks for; exits if there are none."""
    problems = SUITES[suite](selection)
    if kept := selection.apply(problems):
        return kept
    device = "CUDA" if selection.on_cuda else "the CPU"
    raise SystemExit(f"suite {suite} has no such problem; on {device} it has {_choices(problems)}")
