"""Every feature alone and with every other, forward and backward, and the edges of each."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from problems import DTYPES, Problem, check

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal top-left": {"causal": 1, "seqlen_k": 45},
    "causal bottom-right": {"causal": 2, "seqlen_k": 45},
    "window": {"window": (7, 3)},
    "bool mask": {"mask": "bool"},
    "padding mask": {"mask": "bool", "mask_dims": (True, False, False, True)},
    "bias": {"mask": "float", "mask_dims": (False, True, True, True)},
    "row bias": {"mask": "float", "mask_dims": (True, True, False, True)},
    "softcap": {"softcap": 2.0},
    "alibi": {"slopes": "head"},
    "alibi by batch": {"slopes": "batch"},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.3},
    "grouped heads": {"heads": 6, "heads_k": 2},
    "packed": {"packed": True},
    "used lengths": {"used_q": True, "used_k": True},
    "wide values": {"head_dim_v": 40},
    "odd head": {"head_dim": 37, "head_dim_v": 37},
    "gradient of lse": {"use_lse": True},
    "scale": {"scale": -0.4},
    "strided": {"layout": "strided"},
    "misaligned": {"layout": "misaligned"},
    "deterministic": {"deterministic": True},
}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _pairs() -> list[Any]:
    """Pairs that do not set the same field."""
    pairs = []
    for a, b in itertools.combinations(FEATURES, 2):
        if not FEATURES[a].keys() & FEATURES[b].keys():
            pairs.append(pytest.param(FEATURES[a] | FEATURES[b], id=f"{a}, {b}"))
    return pairs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_agrees_with_the_reference(feature: str, dtype: torch.dtype, device: str) -> None:
    check(Problem(dtype=dtype, **FEATURES[feature]), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", _pairs())
def test_a_pair_of_features_agrees_with_the_reference(
    features: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    check(Problem(dtype=dtype, **features), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("seqlen_q", [1, 3, 5])  # on the CPU up to 4 rows have code of their own
def test_few_queries_on_many_keys(seqlen_q: int, feature: str, dtype: torch.dtype, device: str) -> None:
    sizes = {"batch": 1, "seqlen_q": seqlen_q, "seqlen_k": 1700}  # the keys are shared out, and put together again
    check(Problem(dtype=dtype, **(FEATURES[feature] | sizes)), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [0, 1, 8, 64, 96, 128, 192, 256, 320, 1030])
def test_any_head_dim(head_dim: int, dtype: torch.dtype, device: str) -> None:
    check(Problem(dtype=dtype, batch=1, head_dim=head_dim, head_dim_v=head_dim, causal=2), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim, head_dim_v", [(0, 0), (0, 8), (8, 0)])
def test_no_columns(head_dim: int, head_dim_v: int, dtype: torch.dtype, feature: str, device: str) -> None:
    problem = Problem(**(FEATURES[feature] | {"dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v}))
    check(problem, device)
    check(replace(problem, batch=6, seqlen_q=130, seqlen_k=70), device)  # on the CPU several tasks, of several blocks


@pytest.mark.gpu
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_head_dims(dtype: torch.dtype, feature: str) -> None:
    check(replace(Problem(dtype=dtype, **FEATURES[feature]), head_dim=400, head_dim_v=400), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("feature", FEATURES)
def test_features_with_rows_shared_out(feature: str) -> None:
    """So few tiles that blocks share out the query rows that see a key, and the keys that a query row sees."""
    sizes = {"batch": 1, "seqlen_q": 900, "seqlen_k": 900, "dtype": torch.bfloat16}
    check(replace(Problem(**FEATURES[feature]), **sizes), "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 300), (300, 1), (257, 255), (130, 400)]
)
@pytest.mark.parametrize("causal", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths_off_the_tiles(seqlen_q: int, seqlen_k: int, causal: int, dtype: torch.dtype, device: str) -> None:
    problem = Problem(dtype=dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal, head_dim=64, head_dim_v=64)
    check(problem, device)
    check(replace(problem, packed=True, batch=4), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("empty", ["batch", "heads", "head_dim_v"])
def test_empty_dimensions(empty: str, device: str) -> None:
    check(replace(Problem(), **{empty: 0} | ({"heads_k": 0} if empty == "heads" else {})), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_and_growing_keys_do_not_overflow(dtype: torch.dtype, device: str) -> None:
    check(Problem(dtype=dtype, seqlen_q=200, seqlen_k=200, scale=30.0, causal=1), device)
    check(Problem(dtype=dtype, seqlen_q=200, seqlen_k=200, scale=30.0, softcap=5.0, sinks=True), device)
