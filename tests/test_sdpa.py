"""`scaled_dot_product_attention` against torch's function, clause by clause."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flash_attn
from flash_attn import replace_sdpa
from flash_attn import scaled_dot_product_attention as sdpa
from introspection import needs_introspection

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
TORCHS = F.scaled_dot_product_attention


def _randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def _exact(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch's function in float64."""
    args = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    kwargs = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in kwargs.items()}
    with sdpa_kernel(SDPBackend.MATH):
        return TORCHS(q.double(), k.double(), v.double(), *args, **kwargs)


def _noise_of_delta(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    weight: Tensor,
    leaves: list[Tensor],
    attn_mask: Any = None,
    is_causal: bool = False,
    **_: Any,
) -> list[Tensor]:
    """What rounding `out` to the input dtype does to the gradients: through delta, as a gradient of lse would."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    error = torch.finfo(q.dtype).eps * (weight.double() * out.detach()).abs().sum(-1)
    gradients = torch.autograd.grad(scores.logsumexp(-1).expand_as(error), leaves, error, allow_unused=True)
    return [torch.zeros(1) if g is None else g for g in gradients]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorchs_own_samples(dtype: torch.dtype, device: str) -> None:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    count = 0
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        if sample.kwargs.get("dropout_p", 0.0) > 0.0:
            continue
        count += 1
        inputs = (sample.input, *sample.args)
        leaves = [x for x in (*inputs, *sample.kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
        ours, exact = sdpa(*inputs, **sample.kwargs), _exact(*inputs, **sample.kwargs)
        torchs = TORCHS(*inputs, **sample.kwargs)
        assert ours.shape == torchs.shape and ours.dtype == dtype
        weight = torch.randn_like(ours)
        results = [(x, *torch.autograd.grad(x, leaves, weight.to(x.dtype))) for x in (ours, torchs, exact)]
        noise = [torch.zeros(1), *_noise_of_delta(inputs[0], inputs[1], exact, weight, leaves, **sample.kwargs)]
        for a, b, c, n in zip(*results, noise, strict=True):
            allowed = 2 * (b.double() - c).norm() + TOLERANCE[dtype] * c.norm() + 2 * n.norm()
            assert (a.double() - c).norm() <= allowed, sample
    assert count > 5


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((5, 8), (7, 8), (7, 4)),
        ((3, 5, 8), (3, 7, 8), (3, 7, 4)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
        ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((2, 3, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8)),
        ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
        ((1, 3, 5, 8), (4, 3, 7, 8), (4, 1, 7, 8)),
        ((2, 1, 5, 8), (2, 6, 7, 8), (2, 6, 7, 8)),
        ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
        ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 4)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0)),
        ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
    ],
    ids=str,
)
def test_shapes_broadcast_as_in_torch(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    inputs = [_randn(*shape).requires_grad_() for shape in (q, k, v)]
    got, expected = sdpa(*inputs), _exact(*inputs)
    torch.testing.assert_close(got, expected)
    if got.numel() == 0:
        return
    gradients = [torch.autograd.grad(x.sum(), inputs) for x in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_no_heads_of_keys_give_zeros() -> None:
    q, k = _randn(2, 1, 5, 8).requires_grad_(), _randn(2, 0, 7, 8)
    out = sdpa(q, k, k)
    expected = F.scaled_dot_product_attention(q.detach(), k, k)  # of one head from torch 2.12 on, before of none
    assert torch.equal(out, torch.zeros_like(expected))
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))


@pytest.mark.parametrize(
    "mask", [(7,), (1,), (5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7), (1, 3, 1, 1)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast_and_their_gradient_is_reduced(mask: tuple[int, ...], kind: str) -> None:
    q, k, v = _randn(2, 3, 5, 8), _randn(2, 3, 7, 8), _randn(2, 3, 7, 8)
    if kind == "bool":
        attn_mask = torch.rand(mask) > 0.3
        attn_mask[..., 0] = True
        torch.testing.assert_close(sdpa(q, k, v, attn_mask), _exact(q, k, v, attn_mask))
        return
    bias = _randn(*mask).requires_grad_()
    got, expected = sdpa(q, k, v, bias), _exact(q, k, v, bias)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, bias, weight), torch.autograd.grad(expected, bias, weight))


def test_masks_of_five_dimensional_inputs() -> None:
    q = _randn(2, 2, 3, 5, 8)
    for shape in ((5, 5), (2, 1, 1, 5, 5), (1, 2, 3, 1, 5), (1, 1, 3, 5, 5)):
        bias = _randn(*shape)
        torch.testing.assert_close(sdpa(q, q, q, bias), _exact(q, q, q, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_mask_goes_with_16_bit_inputs(dtype: torch.dtype) -> None:
    q = torch.randn(2, 3, 5, 8, dtype=dtype)
    bias = torch.randn(5, 5, requires_grad=True)
    out = sdpa(q, q, q, bias)
    (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert out.dtype == dtype and gradient.dtype == torch.float32
    assert _relative(out, _exact(q, q, q, bias)) < TOLERANCE[dtype]


def test_a_mask_and_is_causal_together_mean_both() -> None:
    q, k, v = (_randn(2, 3, 6, 8) for _ in range(3))
    mask = torch.rand(6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(
        sdpa(q, k, v, mask, is_causal=True), _exact(q, k, v, mask & torch.ones(6, 6).tril().bool())
    )


@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize("heads", [2, 3])
def test_causal_and_causal_bias_alignments(lengths: tuple[int, int], heads: int) -> None:
    q, k = _randn(2, heads, lengths[0], 8), _randn(2, heads, lengths[1], 8)
    ones = torch.ones(lengths, dtype=torch.bool)
    upper, lower = ones.tril(), ones.tril(lengths[1] - lengths[0])

    def masked(mask: Tensor) -> Tensor:
        return _exact(q, k, k, mask).nan_to_num(0.0)

    torch.testing.assert_close(sdpa(q, k, k, is_causal=True), masked(upper))
    torch.testing.assert_close(sdpa(q, k, k, causal_upper_left(*lengths)), masked(upper))
    torch.testing.assert_close(sdpa(q, k, k, causal_lower_right(*lengths)), masked(lower))
    with pytest.raises(ValueError, match="is_causal"):
        sdpa(q, k, k, causal_lower_right(*lengths), is_causal=True)


@pytest.mark.parametrize("heads_k, heads_v", [(6, 6), (2, 2), (1, 1), (3, 3), (2, 3), (1, 6), (6, 2)])
def test_grouped_heads(heads_k: int, heads_v: int) -> None:
    q, k, v = (_randn(2, h, 5, 8).requires_grad_() for h in (6, heads_k, heads_v))
    got = sdpa(q, k, v, enable_gqa=True)
    expected = _exact(q, k.repeat_interleave(6 // heads_k, 1), v.repeat_interleave(6 // heads_v, 1))
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight)
    )


@pytest.mark.parametrize("scale", [None, 0.3, -1.0, 0.0])
def test_scale(scale: float | None) -> None:
    q = _randn(2, 3, 5, 8)
    torch.testing.assert_close(sdpa(q, q, q, scale=scale), _exact(q, q, q, scale=scale))
    assert sdpa(q, q, q, scale=math.nan).isnan().all()


def test_dropout_of_everything_gives_zeros_and_applies_in_any_mode() -> None:
    q = _randn(2, 3, 5, 8).requires_grad_()
    out = sdpa(q, q, q, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))
    assert not torch.equal(sdpa(q, q, q, dropout_p=0.5), sdpa(q, q, q, dropout_p=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_torchs_function(dtype: torch.dtype) -> None:
    x, double = torch.randn(2, 3, 5, 8), _randn(2, 3, 5, 8)
    with torch.autocast("cpu", dtype):
        assert sdpa(x, x.to(dtype), x).dtype == dtype
        assert sdpa(x, x, x, torch.randn(5, 5)).dtype == dtype
        assert sdpa(double, double, double).dtype == torch.float64
        with pytest.raises(RuntimeError, match="same dtype"):
            sdpa(double, x, x)
        with pytest.raises(RuntimeError, match="attn_mask"):
            sdpa(x, x, x, _randn(5, 5))


def _inputs(**changes: Any) -> dict[str, Any]:
    return {name: torch.randn(2, 3, 5, 8) for name in ("query", "key", "value")} | changes


@pytest.mark.parametrize(
    "error, text, changes",
    [
        (RuntimeError, "same dtype", {"key": torch.randn(2, 3, 5, 8).half()}),
        (RuntimeError, "int64", {n: torch.ones(2, 3, 5, 8, dtype=torch.int64) for n in ("query", "key", "value")}),
        (
            NotImplementedError,
            "complex64",
            {n: torch.ones(2, 3, 5, 8, dtype=torch.complex64) for n in ("query", "key", "value")},
        ),
        (
            NotImplementedError,
            r"float8_e4m3fn: convert it, query.to\(torch.bfloat16\)",
            {n: torch.ones(2, 3, 5, 8).to(torch.float8_e4m3fn) for n in ("query", "key", "value")},
        ),
        (RuntimeError, "at least 2 dimensional", {"query": torch.randn(8)}),
        (RuntimeError, "last dimension", {"query": torch.randn(2, 3, 5, 9)}),
        (RuntimeError, "same length", {"value": torch.randn(2, 3, 6, 8)}),
        (RuntimeError, r"broadcast, .*\(2, 4, 5, 8\)[^;]*$", {"query": torch.randn(2, 4, 5, 8)}),
        (RuntimeError, "broadcast.*; .*need enable_gqa=True", {"query": torch.randn(2, 6, 5, 8)}),
        (RuntimeError, r"broadcast, .*\(4, 3, 5, 8\)[^;]*$", {"query": torch.randn(4, 3, 5, 8)}),
        (RuntimeError, r"broadcast, .*\(4, 6, 5, 8\)[^;]*$", {"query": torch.randn(4, 6, 5, 8)}),
        (RuntimeError, "divide", {"query": torch.randn(2, 4, 5, 8), "enable_gqa": True}),
        (IndexError, "enable_gqa", {n: torch.randn(5, 8) for n in ("query", "key", "value")} | {"enable_gqa": True}),
        (TypeError, "is_causal", {"is_causal": 1}),
        (RuntimeError, r"attn_mask must broadcast.*\(4,\)[^;]*$", {"attn_mask": torch.randn(4)}),
        (RuntimeError, r"padding mask .* attn_mask\[:, None, None, :\]", {"attn_mask": torch.ones(2, 5).bool()}),
        (IndexError, "attn_mask", {"attn_mask": torch.tensor(1.0)}),
        (RuntimeError, "attn_mask must broadcast", {"attn_mask": torch.randn(4, 5)}),
        (RuntimeError, "attn_mask must broadcast", {"attn_mask": torch.randn(1, 2, 3, 5, 5)}),
        (RuntimeError, "attn_mask must be bool", {"attn_mask": torch.ones(5, 5, dtype=torch.int32)}),
        (RuntimeError, "attn_mask must be bool", {"attn_mask": torch.ones(5, 5, dtype=torch.float64)}),
        (RuntimeError, "dropout_p", {"dropout_p": -0.1}),
        (RuntimeError, "dropout_p", {"dropout_p": 1.5}),
    ],
)
def test_bad_input_raises_and_says_why(error: type[Exception], text: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=text):
        sdpa(**_inputs(**changes))


def test_non_contiguous_and_expanded_inputs() -> None:
    q = _randn(2, 5, 3, 8).transpose(1, 2)
    k = _randn(1, 3, 8, 5).transpose(-1, -2).expand(2, 3, 5, 8).requires_grad_()
    v = _randn(2, 3, 5, 16)[..., ::2]
    got, expected = sdpa(q, k, v), _exact(q, k, v)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), k), torch.autograd.grad(expected.sum(), k))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_jagged_nested_tensors(causal: bool, heads_k: int) -> None:
    lengths = [3, 0, 9, 5]

    def jagged(heads: int) -> tuple[Tensor, list[Tensor]]:
        parts = [_randn(n, heads * 8) for n in lengths]
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()
        return nested, parts

    (q, qs), (k, ks), (v, vs) = jagged(4), jagged(heads_k), jagged(heads_k)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).transpose(1, 2)

    out = sdpa(split(q), split(k), split(v), is_causal=causal, enable_gqa=heads_k != 4)
    assert out.shape[:2] == (4, 4)
    for got, *parts in zip(out.unbind(), qs, ks, vs, strict=True):
        a, b, c = (x.unflatten(-1, (-1, 8)).transpose(0, 1) for x in parts)
        torch.testing.assert_close(got, sdpa(a, b, c, is_causal=causal, enable_gqa=True))
    out.values().sum().backward()
    assert q.grad is not None and torch.isfinite(q.grad.values()).all()
    with pytest.raises(ValueError, match="attn_mask"):
        sdpa(split(q), split(k), split(v), torch.ones(1, 1, dtype=torch.bool))


def test_torch_function_is_honoured() -> None:
    class Logged(Tensor):
        seen: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    q = torch.randn(2, 3, 5, 8)
    out = sdpa(q.as_subclass(Logged), q, q)
    assert "scaled_dot_product_attention" in Logged.seen
    torch.testing.assert_close(out.as_subclass(Tensor), sdpa(q, q, q))
    with torch.device("cpu"):  # a torch function mode
        torch.testing.assert_close(sdpa(q, q, q), out.as_subclass(Tensor))


def test_sharded_over_batch_and_heads() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not dist.is_available():
        pytest.skip("torch has no distributed package")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        q = torch.randn(2, 3, 5, 8)
        for placement in (Shard(0), Shard(1), Replicate()):
            x = distribute_tensor(q, mesh, [placement]).requires_grad_()
            out = sdpa(x, x, x, is_causal=True)
            assert out.placements == (placement,)
            torch.testing.assert_close(out.full_tensor(), sdpa(q, q, q, is_causal=True))
            out.sum().backward()
            assert x.grad is not None and x.grad.placements == (placement,)
        x = distribute_tensor(q, mesh, [Shard(2)])
        with pytest.raises(NotImplementedError, match="placements"):
            sdpa(x, x, x)
    finally:
        dist.destroy_process_group()


class TestReplaceSdpa:
    def test_restores_exactly_and_nests(self) -> None:
        before = F.scaled_dot_product_attention
        with replace_sdpa():
            inside = F.scaled_dot_product_attention
            assert inside is not before and inside.__name__ == "scaled_dot_product_attention"
            with replace_sdpa():
                pass
            assert F.scaled_dot_product_attention is inside
        assert F.scaled_dot_product_attention is before
        replaced = replace_sdpa()
        assert F.scaled_dot_product_attention is inside
        replaced.restore()
        assert F.scaled_dot_product_attention is before

    @needs_introspection
    def test_modules_run_it(self) -> None:
        module = nn.MultiheadAttention(16, 2, batch_first=True)
        x = torch.randn(2, 5, 16, requires_grad=True)
        expected, _ = module(x, x, x, need_weights=False)
        with replace_sdpa():
            explanation = flash_attn.explain(lambda: module(x, x, x, need_weights=False))
            assert len(explanation.calls) == 1
            torch.testing.assert_close(module(x, x, x, need_weights=False)[0], expected)

    def test_sdpa_kernel_without_flash_runs_torchs_own(self) -> None:
        q = torch.randn(2, 3, 5, 8)
        with replace_sdpa(), sdpa_kernel(SDPBackend.MATH):
            assert not flash_attn.explain(lambda: F.scaled_dot_product_attention(q, q, q)).calls

    def test_causal_bias_and_jagged_do_not_recurse(self) -> None:
        q = torch.randn(1, 2, 4, 8)
        with replace_sdpa():
            torch.testing.assert_close(
                F.scaled_dot_product_attention(q, q, q, causal_lower_right(4, 4)), sdpa(q, q, q, is_causal=True)
            )
            with sdpa_kernel(SDPBackend.MATH):
                F.scaled_dot_product_attention(q, q, q, is_causal=True)
