"""Problems for NVIDIA's compute-sanitizer, which does not need the results compared and would take hours over it.

    compute-sanitizer --tool racecheck --kernel-regex kns=backward python tests/sanitize.py large --head-dims 128

`small`: a tile or two of every feature. `large`: several tiles for each CTA of a large GPU, so that CTAs work on what
others have prepared, added up or written. `packed`: the same of packed sequences. `short`: more heads than CTAs, of a
few blocks each. `few`: so few tiles that CTAs share out a head's query rows. `scores`: masks and all else that changes
scores, over several tiles. `caches` and `float8`: over caches, contiguous and in pages. `latent`: over caches whose
values are all but 64 columns of the keys; --head-dims 576.
"""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import replace

import torch

import cache_problems
from cache_problems import CacheProblem
from flash_attn.torch_op import attention as ops
from problems import MASK_KINDS, Problem, run

HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def small(head_dim: int, dtype: torch.dtype) -> list[Problem]:
    base = Problem(dtype=dtype, seqlen_q=200, seqlen_k=200, head_dim=head_dim, head_dim_v=head_dim)
    return [
        base,
        replace(base, causal=ops.TOP_LEFT),
        replace(base, causal=ops.BOTTOM_RIGHT, seqlen_q=100, use_lse=True),
        replace(base, causal=ops.TOP_LEFT, deterministic=True),
        replace(base, window=(50, 10), heads_k=1),
        replace(base, packed=True, one_starts=True),
    ]


def _in_every_order(base: Problem) -> list[Problem]:
    return [
        replace(base, causal=causal, deterministic=deterministic)
        for causal in (ops.NONE, ops.TOP_LEFT)
        for deterministic in (False, True)
    ]


def large(head_dim: int, dtype: torch.dtype) -> list[Problem]:
    sizes = {"batch": 10, "heads": 8, "heads_k": 8, "seqlen_q": 600, "seqlen_k": 600}
    base = Problem(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, **sizes)
    return [
        *_in_every_order(base),
        replace(base, heads=16, causal=ops.TOP_LEFT),
        replace(base, seqlen_q=700, seqlen_k=310, causal=ops.BOTTOM_RIGHT),
        replace(base, head_dim_v=128 if head_dim == 192 else head_dim, use_lse=True),
    ]


def packed(head_dim: int, dtype: torch.dtype) -> list[Problem]:
    sizes = {"batch": 8, "heads": 8, "heads_k": 8, "seqlen_q": 700, "seqlen_k": 700, "packed": True, "one_starts": True}
    base = Problem(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, **sizes)
    return [
        base,
        replace(base, causal=ops.TOP_LEFT, seed=2),
        replace(base, causal=ops.TOP_LEFT, deterministic=True, seed=3),
        replace(base, deterministic=True, seed=11),
        replace(base, causal=ops.TOP_LEFT, heads_k=4, use_lse=True, seed=12),
        replace(base, batch=60, seqlen_q=200, seqlen_k=200, seed=6),
    ]


def short(head_dim: int, dtype: torch.dtype) -> list[Problem]:
    base = Problem(dtype=dtype, heads=4, heads_k=4, head_dim=head_dim, head_dim_v=head_dim)
    return [
        replace(base, batch=3, seqlen_q=100, seqlen_k=100),
        replace(base, batch=60, seqlen_q=200, seqlen_k=200, causal=ops.TOP_LEFT),
        replace(base, batch=33, seqlen_q=300, seqlen_k=300, deterministic=True),
        replace(base, batch=160, heads_k=2, seqlen_q=130, seqlen_k=100),
        replace(base, batch=160, seqlen_q=1000, seqlen_k=100),  # a tile prepares many blocks
    ]


def few(head_dim: int, dtype: torch.dtype) -> list[Problem]:
    sizes = {"batch": 1, "heads": 3, "heads_k": 3, "seqlen_q": 900, "seqlen_k": 900}
    return _in_every_order(Problem(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, **sizes))


def scores(head_dim: int, dtype: torch.dtype) -> list[Problem]:
    sizes = {"batch": 2, "heads": 4, "heads_k": 2, "seqlen_q": 330, "seqlen_k": 390}
    base = Problem(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, **sizes)
    masked = replace(base, mask="bool", mask_dims=(True, True, True, True))
    biased = replace(masked, mask="float", mask_kind="random")
    return [
        *(replace(masked, mask_kind=kind) for kind in MASK_KINDS),
        replace(masked, mask_dims=(True, False, False, True), mask_kind="padding", deterministic=True),
        biased,
        replace(biased, mask_dims=(False, True, True, True), mask_float32=True),
        replace(biased, causal=ops.BOTTOM_RIGHT, dropout=0.1, softcap=30.0, slopes="head", sinks=True, use_lse=True),
        replace(base, softcap=30.0, causal=ops.TOP_LEFT),
        replace(base, slopes="batch", window=(100, 20)),
        replace(base, sinks=True, dropout=0.5),
        replace(base, packed=True, dropout=0.1, slopes="head", used_k=True),
    ]


def caches(head_dim: int, dtype: torch.dtype) -> list[CacheProblem]:
    base = CacheProblem(dtype, (300, 0, 1, 77), 320, 8, 2, 1, 1, head_dim, head_dim, causal=True)
    paged = replace(base, page_size=16, rotary_dim=head_dim // 2)
    return [
        base,
        replace(base, appended=0, batch_index=True, leftpad=True),
        paged,
        replace(paged, page_size=48, seqlen_q=3, appended=3, float32_tables=True),
        replace(paged, page_size=1, window=(30, 0), sinks=True, slopes="head"),
        replace(base, seqlen_q=8, appended=8, softcap=20.0),
        replace(base, seqlen_q=16, appended=16, page_size=64),
        replace(base, lengths=(5000,), capacity=5008, heads=32, heads_k=8),
        replace(paged, lengths=(3000, 20), capacity=3072, seqlen_q=16, appended=16),
        replace(base, lengths=(70,) * 100, capacity=96, heads=4, page_size=32),
        replace(base, lengths=(900, 20), capacity=960, seqlen_q=40, appended=40),
        replace(paged, lengths=(100, 0, 120, 77), heads=16, seqlen_q=200, appended=200, leftpad=True),  # are copied
        replace(base, heads=16, seqlen_q=200, appended=0, batch_index=True, leftpad=True, slopes="batch"),
        replace(base, lengths=(1024,), capacity=1024, heads=32, heads_k=8, appended=0, full=True),
        replace(base, lengths=(1000,) * 4, capacity=1000, heads=32, heads_k=1, seqlen_q=2, appended=0, full=True),
    ]


def float8(head_dim: int, dtype: torch.dtype) -> list[CacheProblem]:
    kinds = itertools.cycle(("head", "batch"))
    return [replace(p, float8=kind) for kind, p in zip(kinds, caches(head_dim, dtype), strict=False)]


def latent(head_dim: int, dtype: torch.dtype) -> list[CacheProblem]:
    sizes = {"heads_k": 1, "head_dim": head_dim, "head_dim_v": head_dim - 64, "causal": True, "latent": True}
    base = CacheProblem(dtype, (300, 0, 1, 77), 320, 16, seqlen_q=1, appended=1, **sizes)
    return [
        base,
        replace(base, heads=128, page_size=64),
        replace(base, heads=64, page_size=16, lengths=(3000, 20), capacity=3072),
        replace(base, lengths=(70, 33) * 100, capacity=96, page_size=48),
        replace(base, seqlen_q=3, appended=3, leftpad=True, window=(40, 0), sinks=True),
        replace(base, heads=128, lengths=(900, 2000, 40), capacity=2016),
        replace(base, heads=64, lengths=(2000,) * 4, capacity=2000, appended=0, full=True),
    ]


def run_over_cache(problem: CacheProblem, device: str) -> dict[str, torch.Tensor]:
    return {"out": cache_problems.call(problem, cache_problems.make_inputs(problem), device)[0]}


KINDS = {kind.__name__: kind for kind in (small, large, packed, short, few, scores, caches, float8, latent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS, metavar="D")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    problems = [p for head_dim in args.head_dims for p in KINDS[args.kind](head_dim, DTYPES[args.dtype])]
    done = 0
    for problem in problems:
        try:
            over_cache = isinstance(problem, CacheProblem)
            results = run_over_cache(problem, args.device) if over_cache else run(problem, args.device)
        except RuntimeError as error:
            if "FLASH_ATTN_FORCE" in os.environ and "does not take this problem" in str(error):
                continue
            raise
        done += 1
        wrong = [name for name, x in results.items() if name != "lse" and not torch.isfinite(x).all()]
        if wrong:
            raise SystemExit(f"not finite: {', '.join(wrong)} of {problem!r}")
    if not done:
        raise SystemExit("the forced family refuses every problem")
    print(f"{done} problems done, of {len(problems)}")


if __name__ == "__main__":
    main()
