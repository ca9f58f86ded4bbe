"""The mma.sync kernels that know one rule, and the fixed order of their gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.torch_op import attention as ops
from problems import MASK_KINDS, Problem, check_all, run

pytestmark = pytest.mark.gpu

# Several tiles, the last of them a part.
SIZES = {"batch": 2, "heads": 4, "heads_k": 2, "seqlen_q": 330, "seqlen_k": 390}
MASKED = Problem(dtype=torch.bfloat16, mask="bool", mask_dims=(True, True, True, True), **SIZES)
BIASED = replace(MASKED, mask="float", mask_kind="random")
DROPPED = Problem(dtype=torch.bfloat16, dropout=0.2, **SIZES)
RULES = {
    "mask": [
        *(replace(MASKED, mask_kind=kind) for kind in MASK_KINDS),
        replace(MASKED, mask_kind="random", causal=ops.BOTTOM_RIGHT, mask_dims=(False, False, True, True)),
        replace(MASKED, mask_kind="sparse", window=(70, 30), dtype=torch.float16),
    ],
    "bias": [
        *(replace(BIASED, mask_kind=kind, seqlen_k=392) for kind in ("random", "documents", "lowest")),
        replace(BIASED, causal=ops.BOTTOM_RIGHT, seqlen_k=392, mask_dims=(False, False, True, True)),
        replace(BIASED, window=(70, 30), seqlen_k=392, dtype=torch.float16),
        # A gradient that the batch's entries share, by more tiles than run at a time, and by few.
        replace(BIASED, batch=20, heads_k=4, seqlen_k=392, mask_dims=(False, True, True, True)),
        replace(BIASED, batch=3, seqlen_k=392, mask_dims=(False, True, True, True), causal=ops.TOP_LEFT),
    ],
    "dropout": [
        DROPPED,
        replace(DROPPED, causal=ops.BOTTOM_RIGHT, sinks=True, use_lse=True),
        replace(DROPPED, window=(70, 30), dtype=torch.float16),
        replace(DROPPED, packed=True, causal=ops.TOP_LEFT),
        replace(DROPPED, deterministic=True),
    ],
}


@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("rule", RULES)
def test_one_rule_alone(rule: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
    check_all([replace(p, head_dim=head_dim, head_dim_v=head_dim) for p in RULES[rule]], "cuda")


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("shared", [False, True], ids=["bias", "shared bias"])
def test_a_key_that_a_bias_hides_from_a_block_may_be_nan(
    shared: bool, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is hidden from the last block's rows alone, of which most do not exist. Its score is no number either."""
    monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
    q, k, v = (torch.randn(8, 1, 152, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    bias = torch.randn(1 if shared else 8, 1, 152, 152, dtype=torch.bfloat16, device="cuda")
    bias[..., 128:, [40, 151]] = -torch.inf
    expected = sdpa(q, k, v, bias)
    k[..., [40, 151], :] = v[..., [40, 151], :] = torch.nan
    out = sdpa(q, k, v, bias)
    assert torch.isnan(out[..., :128, :]).all()
    assert torch.equal(out[..., 128:, :], expected[..., 128:, :])


@pytest.mark.parametrize("causal", [ops.NONE, ops.TOP_LEFT], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 192, 256])
def test_gradients_in_a_fixed_order_repeat(head_dim: int, causal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With heads that fill the GPU, of fewer blocks of query rows than of keys, and with one alone."""
    monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
    base = Problem(torch.bfloat16, head_dim=head_dim, head_dim_v=head_dim, causal=causal, deterministic=True)
    for batch, heads, seqlen in ((5, 8, 1024), (1, 1, 3000)):
        problem = replace(base, batch=batch, heads=heads, heads_k=heads, seqlen_q=seqlen, seqlen_k=seqlen)
        first, again = run(problem, "cuda"), run(problem, "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)
        unordered = run(replace(problem, deterministic=False), "cuda")
        torch.testing.assert_close(first["dq"], unordered["dq"], rtol=2e-2, atol=2e-2)
