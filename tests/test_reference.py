"""The reference itself, against torch's function and against formulas written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float"])
def test_it_agrees_with_torchs_math_path(kind: str) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    mask = {"bool": torch.rand(2, 3, 5, 7) > 0.3, "float": torch.randn(2, 3, 5, 7, dtype=torch.float64)}.get(kind)
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal")
    out, _ = reference.attention(q, k, v, mask, causal=int(kind == "causal"), heads_first=True)
    torch.testing.assert_close(out, expected)


def test_softcap_slopes_sinks_and_lse_follow_their_formulas() -> None:
    q, k, v = (torch.randn(1, n, 2, 4, dtype=torch.float64) for n in (3, 5, 5))
    slopes, sinks = torch.rand(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    out, lse = reference.attention(q, k, v, None, slopes, sinks, softcap=1.5)
    for h in range(2):
        for i in range(3):
            scores = []
            for j in range(5):
                s = float(q[0, i, h] @ k[0, j, h]) / 2.0
                scores.append(1.5 * math.tanh(s / 1.5) - float(slopes[h]) * abs(i + 2 - j))
            total = sum(math.exp(s) for s in scores) + math.exp(float(sinks[h]))
            row = sum(math.exp(s) / total * v[0, j, h] for j, s in enumerate(scores))
            torch.testing.assert_close(out[0, i, h], row)
            assert abs(float(lse[0, h, i]) - math.log(total)) < 1e-12
