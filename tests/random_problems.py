"""Random problems, each told by its seed."""

from __future__ import annotations

import dataclasses
import random

import torch

from problems import DTYPES, MASK_KINDS, Problem


def random_problem(seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES, max_seqlen: int = 150) -> Problem:
    """Every feature is on in a third of the problems, so that most have several at once."""
    rng = random.Random(seed)

    def sometimes(share: float = 1 / 3) -> bool:
        return rng.random() < share

    heads_k = rng.choice((1, 1, 2, 3))
    heads = heads_k * rng.choice((1, 1, 2, 4))
    seqlen_q = rng.choice(
        (0, 1, 2, 7, rng.randint(1, max_seqlen), rng.randint(1, max_seqlen), rng.randint(1, max_seqlen))
    )
    seqlen_k = seqlen_q if sometimes() else rng.choice((0, 1, rng.randint(1, max_seqlen), rng.randint(1, max_seqlen)))
    head_dim = rng.choice((1, 8, 16, 32, 40, 64, 80, 128, rng.randint(1, 140)))
    packed = sometimes()
    mask = rng.choice(("bool", "float")) if sometimes() else ""
    return Problem(
        dtype=rng.choice(dtypes),
        batch=rng.choice((1, 2, 3)),
        heads=heads,
        heads_k=heads_k,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim if sometimes(0.6) else rng.choice((1, 8, 24, 64, rng.randint(1, 140))),
        causal=rng.choice((0, 0, 1, 2)),
        window=(rng.choice((-1, 0, rng.randint(0, 80))), rng.choice((-1, 0, rng.randint(0, 80))))
        if sometimes()
        else (-1, -1),
        softcap=rng.choice((0.5, 3.0, 30.0)) if sometimes(0.2) else 0.0,
        scale=rng.choice((0.3, 1.0, -0.2)) if sometimes(0.2) else None,
        mask=mask,
        mask_dims=(sometimes(0.5), sometimes(0.5), sometimes(0.7), sometimes(0.8)),
        mask_float32=sometimes(),
        slopes=rng.choice(("head", "batch")) if sometimes(0.25) else "",
        sinks=sometimes(0.25),
        dropout=rng.choice((0.1, 0.5, 0.9, 1.0)) if sometimes(0.25) else 0.0,
        packed=packed,
        one_starts=packed and seqlen_q == seqlen_k and seed % 2 == 0,
        used_q=sometimes(0.2),
        used_k=sometimes(0.2),
        layout=rng.choice(
            ("dense", "strided", "misaligned") if packed else ("dense", "heads_first", "qkv", "strided", "misaligned")
        ),
        use_lse=sometimes(),
        frozen=tuple(name for name in ("q", "k", "v", "mask", "slopes", "sinks") if sometimes(0.15)),
        deterministic=sometimes(),
        seed=seed,
    )


def random_masked_problem(
    seed: int,
    head_dims: tuple[int, ...] = (64, 128),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
) -> Problem:
    """For tensor-core kernels: tensors as they want them, mostly with a mask, several tiles, other features as well."""
    rng = random.Random(seed)
    p = random_problem(seed, dtypes)
    head_dim = rng.choice((*head_dims, *head_dims, 8, 40, 96, 192, 256, 320, 512))
    rows = (1, 16, 64, 100, 192, 200, rng.randint(1, 700), rng.randint(1, 700))
    return dataclasses.replace(
        p,
        seqlen_q=rng.choice(rows),
        seqlen_k=rng.choice(rows),
        head_dim=head_dim,
        head_dim_v=head_dim if rng.random() < 0.7 else rng.choice((8, 64, 128)),
        scale=rng.choice((None, None, 0.3)),
        mask=rng.choice(("", "bool", "bool", "bool", "float")),
        mask_kind=rng.choice(MASK_KINDS),
        window=p.window if p.window == (-1, -1) or rng.random() < 0.5 else (rng.randint(0, 300), rng.randint(0, 300)),
        layout=rng.choice(("dense", "heads_first", "qkv")) if not p.packed else "dense",
        one_starts=False,
    )
