"""The universal family's kernels for float32 with 8 x 8 sums a thread: what GPUs run whose tensor cores are no faster,
and elsewhere inputs that pairs of fp16 can't hold."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

from flash_attn.torch_op import attention as ops
from introspection import needs_kernels
from plans import H200, plan
from problems import MASK_KINDS, Problem, check_all, run

FORCED = os.environ.get("FLASH_ATTN_FORCE")
GEFORCE = (89, 128, 101376, 72 << 20)
TURING = (75, 68, 65536, 4 << 20)
RNG_STATE = {"rng_state": (1 << 20, "int64", 0, [2], [1])}
SLOPES = {"alibi_slopes": (1 << 20, "float32", 0, [16], [1])}

on_gpu = [
    pytest.mark.gpu,
    needs_kernels("sm80"),
    pytest.mark.skipif(FORCED not in (None, "universal"), reason="another family is forced"),
]


def _problem(head_dim: int, **changes: object) -> Problem:
    """Enough blocks for a large GPU, so that it gets large tiles."""
    base = Problem(torch.float32, 35, 2, 2, 300, 300, head_dim, head_dim)
    return replace(base, **changes)  # type: ignore[arg-type]


SHAPES = [
    _problem(head_dim, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal)
    for head_dim, (seqlen_q, seqlen_k), causal in itertools.product(
        (20, 64, 100, 128), ((1, 1), (66, 128), (129, 257), (500, 70), (65, 600)), (ops.NONE, ops.BOTTOM_RIGHT)
    )
]
FEATURES = [
    dict(causal=ops.TOP_LEFT, heads=6),
    dict(window=(70, 5)),
    dict(window=(0, 0)),
    dict(window=(-1, 30), seqlen_q=200, heads=4, heads_k=1),
    dict(packed=True, one_starts=True, causal=ops.TOP_LEFT),
    dict(packed=True, used_k=True, used_q=True),
    dict(used_k=True, used_q=True, causal=ops.BOTTOM_RIGHT),
    dict(sinks=True, use_lse=True),
    dict(layout="heads_first", scale=-0.3),
    dict(layout="qkv"),
    dict(layout="strided"),
    dict(layout="misaligned"),
    dict(deterministic=True, causal=ops.TOP_LEFT, heads=4),
    *(dict(frozen=frozen) for frozen in (("q",), ("k",), ("v",), ("q", "k"), ("q", "v"), ("k", "v"))),
    *(dict(frozen=frozen, deterministic=True) for frozen in (("k", "v"), ("k",))),
]
RULES = [
    dict(softcap=3.0, causal=ops.BOTTOM_RIGHT),
    dict(slopes="head", window=(100, 20)),
    dict(slopes="batch", causal=ops.TOP_LEFT, heads=4, frozen=("slopes",)),
    dict(dropout=0.3, heads=4, use_lse=True),
    dict(dropout=0.5, causal=ops.TOP_LEFT, softcap=20.0, slopes="head"),
    dict(dropout=0.2, packed=True, one_starts=True, causal=ops.TOP_LEFT),
    *(dict(mask=mask, mask_kind=kind) for mask in ("bool", "float") for kind in MASK_KINDS),
    dict(mask="float", mask_dims=(False, False, True, True), softcap=5.0, dropout=0.1, sinks=True),
    dict(mask="float", mask_dims=(True, False, False, True), packed=True, used_k=True),
    dict(mask="bool", mask_dims=(False, True, True, False), deterministic=True, heads=4, heads_k=1),
    dict(mask="bool", mask_kind="padding", frozen=("q", "k"), window=(200, 50)),
    dict(mask="float", mask_kind="documents", frozen=("v",), slopes="head"),
]


class TestResults:
    pytestmark = on_gpu

    @pytest.fixture(autouse=True)
    def _universal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASH_ATTN_FORCE", "universal")

    def test_lengths_off_the_tiles(self) -> None:
        check_all(SHAPES, "cuda")

    @pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (40, 128), (192, 96), (76, 260)])
    def test_features(self, head_dim: int, head_dim_v: int) -> None:
        check_all([_problem(head_dim, head_dim_v=head_dim_v, **feature) for feature in FEATURES], "cuda")

    @pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (40, 136)])
    def test_rules_of_scores(self, head_dim: int, head_dim_v: int) -> None:
        sizes = dict(head_dim_v=head_dim_v, seqlen_q=333, seqlen_k=390)
        check_all([_problem(head_dim, **sizes, **rule) for rule in RULES if "one_starts" not in rule], "cuda")
        check_all([_problem(head_dim, head_dim_v=head_dim_v, **rule) for rule in RULES if "one_starts" in rule], "cuda")

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_a_fixed_order_gives_the_same_bits(self, head_dim: int) -> None:
        problem = _problem(head_dim, seqlen_q=700, seqlen_k=700, deterministic=True)
        first, second = (run(problem, "cuda") for _ in range(2))
        assert all(torch.equal(x, second[name]) for name, x in first.items())

    @pytest.mark.parametrize("causal", [ops.NONE, ops.TOP_LEFT])
    def test_nan_goes_no_further_than_to_tiles_that_see_it(self, causal: int) -> None:
        q, k, v = (torch.randn(20, 600, 2, 64, device="cuda") for _ in range(3))
        k[:, 550] = v[:, 550] = torch.nan
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, _ = ops.attention(q, k, v, causal=causal)
        grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert out.isnan().any()
        if causal == ops.TOP_LEFT:
            assert not out[:, :512].isnan().any() and not grads[0][:, :512].isnan().any()

    @pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
    def test_nothing_comes_of_rows_that_a_mask_hides(self, floating: bool) -> None:
        """Though tiles hold some that are seen."""
        q, k, v, dout = (torch.randn(20, 500, 2, 64, device="cuda") for _ in range(4))
        seen = torch.ones(20, 1, 500, 500, dtype=torch.bool, device="cuda")
        seen[:, :, :, 430:] = False
        seen[:, :, 100:130] = False
        mask = torch.where(seen, 0.0, -torch.inf) if floating else seen

        def results(fill: float, deterministic: bool) -> list[torch.Tensor]:
            k[:, 430:] = v[:, 430:] = fill
            dout[:, 100:130] = q[:, 100:130] = fill
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out, _ = ops.attention(*leaves, attn_mask=mask, deterministic=deterministic)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        for clean, found in zip(results(0.0, True), results(torch.nan, True), strict=True):
            assert torch.equal(clean, found)
        for clean, found in zip(results(0.0, False), results(torch.nan, False), strict=True):
            torch.testing.assert_close(clean, found)


def _universal(**arguments: object) -> tuple[dict[str, object], dict[str, object]]:
    chosen = plan(dtype="float32", **arguments)  # type: ignore[arg-type]
    return chosen["forward"], chosen["backward"]


class TestPlans:
    pytestmark = needs_kernels("sm80")

    @pytest.fixture(autouse=True)
    def _universal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASH_ATTN_FORCE", "universal")

    @pytest.mark.parametrize("head_dim", [20, 64, 100, 128, 256])
    @pytest.mark.parametrize("softcap", [0.0, 3.0])
    def test_rows_of_whole_16_bytes_get_large_tiles(self, head_dim: int, softcap: float) -> None:
        for chosen in _universal(head_dim=head_dim, device=GEFORCE, causal=1, softcap=softcap):
            assert "8x8" in str(chosen["kernel"])

    @pytest.mark.parametrize(
        "options, columns",
        [
            (dict(softcap=3.0), (128, 64)),
            (dict(dropout_p=0.1, tensors=RNG_STATE), (128, 64)),
            (dict(tensors=SLOPES), (128, 128)),
        ],
        ids=["softcap", "dropout", "alibi"],
    )
    def test_how_many_columns_a_block_computes(self, options: dict[str, object], columns: tuple[int, int]) -> None:
        for chosen, count in zip(_universal(head_dim=128, device=GEFORCE, **options), columns, strict=True):
            assert chosen["kernel"] == f"simt fp32 d{count} 8x8 extended"

    @pytest.mark.parametrize(
        "arguments",
        [
            dict(head_dim=16),
            dict(head_dim=66),
            dict(device=TURING),
            dict(batch=1, heads=2, seqlen_q=512, seqlen_k=77),
            dict(address=(1 << 20) + 4),
        ],
        ids=str,
    )
    def test_the_others_do_not(self, arguments: dict[str, object]) -> None:
        for chosen in _universal(**({"device": GEFORCE, "head_dim": 64} | arguments)):
            assert "8x8" not in str(chosen["kernel"])

    @pytest.mark.parametrize(
        "head_dim, seqlen_q, seqlen_k, heads, large",
        [
            (64, 128, 4096, 8, (True, True)),
            (64, 1024, 256, 8, (False, False)),
            (64, 1024, 1024, 24, (False, True)),
            (64, 512, 512, 24, (True, True)),
            (128, 1024, 1024, 2, (True, True)),
            (128, 4096, 77, 8, (True, False)),
        ],
        ids=str,
    )
    def test_large_tiles_where_they_were_faster(
        self, head_dim: int, seqlen_q: int, seqlen_k: int, heads: int, large: tuple[bool, bool]
    ) -> None:
        """On the H200, by 8% and more in one of the two passes."""
        sizes = {"batch": 1, "heads": heads, "heads_k": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        for chosen, expected in zip(_universal(head_dim=head_dim, device=H200, **sizes), large, strict=True):
            assert ("8x8" in str(chosen["kernel"])) == expected
