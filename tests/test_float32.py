"""float32 on tensor cores, as pairs of fp16: no less exact than float32 multiply-adds, which the universal kernels use.

Errors are against float64, over eight inputs of a kind together. Each rule of the method has an input that fails
without it: sums inside of the tensor core shrink ("V mean 1"), numbers of 1e-6 are subnormal in fp16, as P of a few
thousand keys are and as dS is where dout's columns are of different size ("columns 2"); a part left out costs 300 times
the error on any input.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attn.torch_op import attention as ops
from introspection import needs_kernels
from problems import Problem, run

FORCED = os.environ.get("FLASH_ATTN_FORCE")
SEEDS = 8

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
FAMILY = FORCED or ("sm90" if ON_HOPPER else "sm80")  # whose pairs are tested on the GPU that is there

gpu = [
    pytest.mark.gpu,
    needs_kernels("sm80"),
    pytest.mark.skipif(FORCED not in (None, "sm80", "sm90"), reason="another family is forced"),
]


def _spread(decades: float, *shape: int) -> Tensor:
    return 10 ** torch.empty(shape, dtype=torch.float64, device="cuda").uniform_(-decades, decades)


def _scaled(q: float, k: float, v: float, dout: float) -> Callable[..., None]:
    def apply(*tensors: Tensor) -> None:
        for x, factor in zip(tensors, (q, k, v, dout), strict=True):
            x *= factor

    return apply


def _outliers(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    k.scatter_(-1, torch.randint(k.shape[-1], k.shape[:-1], device="cuda")[..., None], 30.0)


def _growing(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    k *= torch.logspace(-3, 1, k.shape[-2], dtype=k.dtype, device="cuda")[:, None]


def _one_large_value(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    v[..., v.shape[-2] // 3, 5] = 1e4


def _columns(decades: float) -> Callable[..., None]:
    def apply(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        a, b = _spread(decades, q.shape[-1]), _spread(decades, v.shape[-1])
        q *= a
        k /= a
        v *= b
        dout /= b

    return apply


def _rows(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    v *= _spread(2, *v.shape[:-1], 1)
    dout *= _spread(4, *dout.shape[:-1], 1)


def _wide(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    v *= _spread(6, *v.shape)
    dout *= _spread(6, *dout.shape)


def _mean_of_values(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    v *= 0.1
    v += 1


# What changes standard normal inputs; those of the second list are left to the universal kernels.
KINDS: dict[str, Callable[..., None]] = {
    "normal": _scaled(1, 1, 1, 1),
    "x30": _scaled(30, 30, 30, 30),
    "one entry of each key 30": _outliers,
    "keys grow": _growing,
    "one entry of V 1e4": _one_large_value,
    "tiny": _scaled(1e-6, 1e-6, 1e-6, 1e-6),
    "huge": _scaled(1e6, 1e-6, 1e6, 1e6),
    "columns 2": _columns(2),
    "rows": _rows,
    "every entry": _wide,
    "V mean 1": _mean_of_values,
}
FLAGGED: dict[str, Callable[..., None]] = {"columns 4": _columns(4)}
# lse is as exact as S, whose sums the tensor core rounds toward zero: it leans low. Logits in the thousands make all
# errors those of a few rows, which eight inputs do not average.
LSE_BOUND, LARGE_LOGITS_BOUND = 2.5, 1.3
# Over few columns a float32 sum is nearly exact: what is left are the roundings of P and dS. Pairs are used there where
# rows are many, or where they are asked for.
FEW_COLUMNS, FEW_COLUMNS_BOUND, MANY_ROWS = 32, 1.2, 256


def _inputs(kind: str, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """q, k, v, dout of (batch, heads, seqlen, head_dim)."""
    tensors = [torch.randn(shape, dtype=torch.float64, device="cuda") for _ in range(4)]
    (KINDS | FLAGGED)[kind](*tensors)
    return [x.float() for x in tensors]


def _exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> dict[str, Tensor]:
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp()
    dp = dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return {"out": p @ v, "lse": lse, "dq": ds @ k * scale, "dk": ds.mT @ q * scale, "dv": p.mT @ dout}


def _found(
    family: str, inputs: list[Tensor], causal: bool, monkeypatch: pytest.MonkeyPatch, deterministic: bool = False
) -> dict[str, Tensor]:
    monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    mask = ops.TOP_LEFT if causal else ops.NONE
    out, lse = ops.attention(q, k, v, heads_first=True, causal=mask, deterministic=deterministic)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs[3])
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def _check(kind: str, seqlen: int, head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if FAMILY == "sm80" and head_dim > 64:
        pytest.skip("its kernels are for 64 columns")
    inputs = _inputs(kind, (SEEDS, 1, seqlen, head_dim))
    want = _exact(*inputs, causal)
    pairs = _found(FAMILY, inputs, causal, monkeypatch)
    # Each sum term by term, as the order is fixed: dq as a sum of sums, in any order, would be nearer.
    universal = _found("universal", inputs, causal, monkeypatch, deterministic=True)
    for name, exact in want.items():
        mine, yardstick = ((x[name].double() - exact) for x in (pairs, universal))
        rms = float(mine.square().mean().sqrt() / yardstick.square().mean().sqrt())
        few = FEW_COLUMNS_BOUND if head_dim <= FEW_COLUMNS and seqlen < MANY_ROWS else 1.05
        bound = LSE_BOUND if name == "lse" else LARGE_LOGITS_BOUND if kind == "x30" else few
        assert rms <= bound, f"{name}: RMS {rms:.2f} times that of float32 multiply-adds, at most {bound}"
        ulp = 2**-23 * float(exact.abs().max())
        largest, allowed = float(mine.abs().max()), 2 * float(yardstick.abs().max()) + ulp
        assert largest <= allowed or name == "lse", f"{name}: largest error {largest:.2e}, at most {allowed:.2e}"
        if kind in FLAGGED and name != "dq":  # which many add to, in whatever order
            assert torch.equal(pairs[name], universal[name])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", [*KINDS, *FLAGGED])
class TestExactness:
    pytestmark = gpu

    def test_errors_are_at_most_those_of_float32(
        self, kind: str, head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _check(kind, 1024, head_dim, causal, monkeypatch)


def _to_fp16_digits(x: Tensor) -> Tensor:
    """The nearest numbers of 11 significant bits, which fp16 and TF32 have, of any exponent."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def _of_rounded(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> dict[str, Tensor]:
    """_exact() with every factor of a product rounded."""
    dout, scale = dout.double(), q.shape[-1] ** -0.5
    q, k, v, rounded_dout = (_to_fp16_digits(x.double()) for x in (q, k, v, dout))
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp()
    rounded_p = _to_fp16_digits(p)
    out = rounded_p @ v
    ds = p * (rounded_dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    ds = _to_fp16_digits(ds)
    return {"out": out, "lse": lse, "dq": ds @ k * scale, "dk": ds.mT @ q * scale, "dv": rounded_p.mT @ rounded_dout}


class TestReduced:
    """FLASH_ATTN_FLOAT32=reduced: the error is that of rounding each factor of a product to 11 bits, as TF32 does."""

    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def _reduced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASH_ATTN_FLOAT32", "reduced")

    @pytest.mark.parametrize("deterministic", [False, True], ids=["free", "fixed"])
    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize("head_dim", [40, 64, 128])
    @pytest.mark.parametrize("kind", ["normal", "keys grow", "tiny", "huge", "one entry of V 1e4", "V mean 1"])
    def test_errors_are_those_of_tf32(
        self, kind: str, head_dim: int, causal: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if FAMILY == "sm80" and head_dim > 64:
            pytest.skip("its kernels are for 64 columns")
        inputs = _inputs(kind, (2, 2, 1024, head_dim))
        want, rounded = _exact(*inputs, causal), _of_rounded(*inputs, causal)
        found = _found(FAMILY, inputs, causal, monkeypatch, deterministic)
        for name in ("out", "dq", "dk", "dv"):
            exact = want[name]
            mine, yardstick = (float((x[name].double() - exact).square().mean().sqrt()) for x in (found, rounded))
            assert mine <= 1.15 * yardstick, f"{name}: RMS error {mine:.2e}, with factors of 11 bits {yardstick:.2e}"
            assert mine >= 0.5 * yardstick, f"{name}: RMS error {mine:.2e} is not of a reduced product"

    def test_flagged_inputs_stay_exact(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = _inputs("columns 4", (1, 1, 1024, 64))
        reduced, universal = (_found(family, inputs, False, monkeypatch) for family in (FAMILY, "universal"))
        assert torch.equal(reduced["out"], universal["out"])

    def test_features_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASH_ATTN_FORCE", FAMILY)
        shape = dict(dtype=torch.float32, batch=2, heads=4, heads_k=2, head_dim=64, head_dim_v=64)
        sizes = dict(seqlen_q=300, seqlen_k=333)
        for feature in (
            dict(mask="bool"),
            dict(mask="float"),
            dict(softcap=3.0, slopes="head"),
            dict(dropout=0.3, causal=ops.BOTTOM_RIGHT),
            dict(packed=True, window=(60, 20), use_lse=True),
        ):
            problem = Problem(**shape, **sizes, **feature)  # type: ignore[arg-type]
            monkeypatch.setenv("FLASH_ATTN_FLOAT32", "exact")
            exact = run(problem, "cuda")
            monkeypatch.setenv("FLASH_ATTN_FLOAT32", "reduced")
            for name, x in run(problem, "cuda").items():
                finite = exact[name].isfinite()
                mine, other = x.detach()[finite].double(), exact[name].detach()[finite].double()
                far = float((mine - other).square().mean().sqrt() / other.square().mean().sqrt())
                assert 0 < far < 3e-3, (name, far, problem)


class TestSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize("head_dim", [24, 32, 61, 64, 80, 128, 192, 256])
    @pytest.mark.parametrize("seqlen", [1, 64, 100, 256])
    def test_short_sequences(self, seqlen: int, head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if seqlen == 1 and (FAMILY == "sm90" or head_dim <= 64):
            inputs = _inputs("normal", (SEEDS, 1, 1, head_dim))
            found = _found(FAMILY, inputs, causal, monkeypatch)
            torch.testing.assert_close(found["out"], inputs[2], rtol=2**-22, atol=0)
            return
        _check("normal", seqlen, head_dim, causal, monkeypatch)

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_gradients_in_a_fixed_order(self, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of one owner each, which is another kernel where dq is otherwise added up in whatever order."""
        if FAMILY == "sm80" and head_dim > 64:
            pytest.skip("its kernels are for 64 columns")
        inputs = _inputs("normal", (2, 2, 700, head_dim))
        fixed, again = (_found(FAMILY, inputs, True, monkeypatch, deterministic=True) for _ in range(2))
        free = _found(FAMILY, inputs, True, monkeypatch)
        want = _exact(*inputs, True)
        for name, mine in fixed.items():
            assert torch.equal(mine, again[name]), name
            errors = [float((x.double() - want[name]).square().mean()) for x in (mine, free[name])]
            assert errors[0] == pytest.approx(errors[1], rel=0.2), name

    def test_long_sums_do_not_shrink(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A sum that stayed in the tensor core would be 70 times as far off, and each row by as much toward zero."""
        q, k, v, dout = _inputs("V mean 1", (1, 1, 16384, 64 if FAMILY == "sm80" else 128))
        want = _exact(q[:, :, :64], k, v, dout[:, :, :64], False)["out"]
        monkeypatch.setenv("FLASH_ATTN_FORCE", FAMILY)
        error = ops.attention(q, k, v, heads_first=True)[0][:, :, :64].double() - want
        assert float(error.square().mean().sqrt()) < 1e-6
        assert abs(float((error * want.sign()).mean())) < 5e-7


class TestFlags:
    """Which (batch, KV head) are left to the universal kernels: their results are those, bit by bit."""

    pytestmark = gpu

    @staticmethod
    def _flagged(inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
        pairs, universal = (_found(family, inputs, False, monkeypatch, True) for family in (FAMILY, "universal"))
        same = [
            pairs[name].nan_to_num().eq(universal[name].nan_to_num()).flatten(2).all(2)
            for name in ("out", "dq", "dk", "dv")
        ]
        for other in same[1:]:
            assert torch.equal(same[0], other)
        return same[0]

    @pytest.mark.parametrize("which", [1, 2], ids=["k", "v"])
    @pytest.mark.parametrize("exponent, flagged", [(13, False), (18, True)])
    @pytest.mark.parametrize("dim", [-2, -1], ids=["row", "column"])
    def test_the_range_of_a_tile(
        self, dim: int, exponent: int, flagged: bool, which: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = _inputs("normal", (2, 3, 200, 64))
        for x in inputs:
            x.sign_()
        inputs[which][1, 2].select(dim, 20).mul_(2.0**-exponent)
        expected = torch.zeros(2, 3, dtype=torch.bool, device="cuda")
        expected[1, 2] = flagged
        assert torch.equal(self._flagged(inputs, monkeypatch), expected)

    @pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
    @pytest.mark.parametrize("value", [1e25, 1e-30])
    def test_what_no_power_of_two_brings_into_range(
        self, value: float, which: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = _inputs("normal", (1, 2, 100, 32))
        for x in inputs[:3]:
            x *= 1e-3
        inputs[which][0, 1] *= value
        found = self._flagged(inputs, monkeypatch) if which < 3 else None
        if found is not None:
            assert found.tolist() == [[False, True]]
        pairs, universal = (_found(family, inputs, False, monkeypatch) for family in (FAMILY, "universal"))
        for name in pairs:
            finite = universal[name][universal[name].isfinite()]
            atol = 1e-4 * float(finite.abs().max())
            torch.testing.assert_close(pairs[name], universal[name], rtol=1e-3, atol=atol, equal_nan=True)

    @pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_goes_where_universal_lets_it_go(
        self, value: float, which: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = _inputs("normal", (2, 2, 150, 64))
        inputs[which][1, 0, 70, 3] = value
        pairs, universal = (_found(family, inputs, True, monkeypatch) for family in (FAMILY, "universal"))
        for name, mine in pairs.items():
            assert torch.equal(mine.isnan(), universal[name].isnan()), name
            assert torch.equal(mine.isinf(), universal[name].isinf()), name

    @pytest.mark.parametrize("flagged", [False, True])
    def test_the_gradient_of_a_bias(self, flagged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a sum over both batch entries, to which a flagged head adds its share."""
        monkeypatch.setenv("FLASH_ATTN_FORCE", FAMILY)
        q, k, v, dout = _inputs("normal", (2, 3, 200, 64))
        if flagged:
            k[1, 2, 7] *= 2.0**-30
        bias = torch.randn(1, 3, 200, 200, device="cuda", requires_grad=True)
        out = ops.attention(q, k, v, heads_first=True, attn_mask=bias)[0]
        (found,) = torch.autograd.grad(out, bias, dout)
        exact = bias.detach().double().requires_grad_()
        p = (q.double() @ k.double().mT / 8 + exact).softmax(-1)
        (want,) = torch.autograd.grad(p @ v.double(), exact, dout.double())
        torch.testing.assert_close(found.double(), want, rtol=0, atol=2**-20 * float(want.abs().max()))

    def test_a_flagged_head_leaves_the_others_as_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = _inputs("normal", (2, 3, 200, 64))
        before = _found(FAMILY, inputs, False, monkeypatch, deterministic=True)
        inputs[1][1, 2, 7] *= 2.0**-30
        after = _found(FAMILY, inputs, False, monkeypatch, deterministic=True)
        for name, mine in after.items():
            same = (mine == before[name]).flatten(2).all(2)
            assert int(same.sum()) == 5 and not same[1, 2], name
