"""`flash_attn_func` and `flash_attn_varlen_func`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention

COMMON = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}


def test_names_order_and_defaults() -> None:
    def positional(function: object) -> dict[str, object]:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

    empty = inspect.Parameter.empty
    assert list(positional(flash_attn_func).items()) == [("q", empty), ("k", empty), ("v", empty), *COMMON.items()]
    lengths = [(n, empty) for n in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    assert list(positional(flash_attn_varlen_func).items()) == [
        ("q", empty),
        ("k", empty),
        ("v", empty),
        *lengths,
        *COMMON.items(),
        ("block_table", None),
    ]


def test_causal_is_aligned_at_the_bottom_right_and_windows_are_inclusive() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 9, 3, 8)
    i, j = torch.arange(4).view(-1, 1) + 5, torch.arange(9)

    def expected(mask: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)), mask).transpose(1, 2)

    torch.testing.assert_close(flash_attn_func(q, k, k, causal=True), expected(j <= i))
    torch.testing.assert_close(flash_attn_func(q, k, k, window_size=(2, 1)), expected((j >= i - 2) & (j <= i + 1)))
    torch.testing.assert_close(
        flash_attn_func(q, k, k, causal=True, window_size=(2, 5)), expected((j >= i - 2) & (j <= i))
    )


def test_what_is_returned() -> None:
    q = torch.randn(2, 4, 3, 8)
    out, lse = flash_attn_func(q, q, q, return_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 3, 4) and lse.dtype == torch.float32
    out, lse, probabilities = flash_attn_func(q, q, q, return_attn_probs=True)
    assert probabilities is None
    scores = torch.einsum("bihd,bjhd->bhij", q, q) / 8**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_packed_sequences_equal_single_ones(as_tensor: bool) -> None:
    lengths = [5, 0, 12, 1]
    starts = torch.tensor([0, 5, 5, 17, 18], dtype=torch.int32)
    q, k, v = (torch.randn(18, h, 8, requires_grad=True) for h in (4, 2, 2))
    longest = torch.tensor(12) if as_tensor else 12
    out, lse = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True, return_lse=True)
    assert lse.shape == (4, 18)
    parts = [
        flash_attn_func(*(x.unsqueeze(0) for x in p), causal=True)[0]
        for p in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(parts))
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), weight)
    torch.testing.assert_close(got, torch.autograd.grad(torch.cat(parts), (q, k, v), weight))


def test_slopes_and_sinks_of_16_bit_parameters_get_gradients() -> None:
    q = torch.randn(2, 4, 3, 8).bfloat16()
    slopes, sink = torch.rand(3, requires_grad=True), torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    out = flash_attn_func(q, q, q, alibi_slopes=slopes, learnable_sink=sink)
    for x, gradient in zip((slopes, sink), torch.autograd.grad(out.sum(), (slopes, sink)), strict=True):
        assert gradient.dtype == x.dtype and gradient.abs().sum() > 0
    torch.testing.assert_close(out, flash_attn_func(q, q, q, alibi_slopes=slopes, s_aux=sink))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_torchs_function(dtype: torch.dtype) -> None:
    x, double = torch.randn(9, 3, 8, requires_grad=True), torch.randn(9, 3, 8, dtype=torch.float64)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    slopes, sink = torch.rand(3, requires_grad=True), torch.randn(3, requires_grad=True)

    def batched(*qkv: Tensor, **options: Any) -> Any:
        return flash_attn_func(*(x[None] for x in qkv), **options)

    def packed(*qkv: Tensor, **options: Any) -> Any:
        return flash_attn_varlen_func(*qkv, starts, starts, 5, 5, **options)

    for attend in (batched, packed):
        expected, _ = attend(*(x.to(dtype),) * 3, alibi_slopes=slopes, learnable_sink=sink, return_lse=True)
        with torch.autocast("cpu", dtype):
            for qkv in ((x, x, x), (x.to(dtype), x, x)):
                out, lse = attend(*qkv, alibi_slopes=slopes, learnable_sink=sink, return_lse=True)
                assert out.dtype == dtype and lse.dtype == torch.float32 and torch.equal(out, expected)
            assert attend(double, double, double).dtype == torch.float64
            with pytest.raises(RuntimeError, match="same dtype"):
                attend(double, x, x)
        for leaf, gradient in zip((x, slopes, sink), torch.autograd.grad(out.sum(), (x, slopes, sink)), strict=True):
            assert gradient.dtype == leaf.dtype and gradient.abs().sum() > 0


@pytest.mark.parametrize("how", ["strided", "expanded"])
def test_small_tensors_have_any_strides(how: str) -> None:
    def spread(x: Tensor) -> Tensor:
        if how == "expanded" and bool((x == x[0]).all()):
            return x[:1].expand_as(x)
        return torch.stack((x, torch.full_like(x, -1)), 1)[:, 0]

    q = torch.randn(9, 3, 8)
    vectors = {
        "cu_seqlens_q": torch.tensor([0, 4, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 4, 9], dtype=torch.int32),
        "seqused_q": torch.tensor([4, 4], dtype=torch.int32),
        "seqused_k": torch.tensor([3, 3], dtype=torch.int32),
        "alibi_slopes": torch.full((3,), 0.5),
        "learnable_sink": torch.ones(3),
    }
    expected = flash_attn_varlen_func(q, q, q, max_seqlen_q=5, max_seqlen_k=5, **vectors)
    spread_out = {name: spread(x) for name, x in vectors.items()}
    assert torch.equal(flash_attn_varlen_func(q, q, q, max_seqlen_q=5, max_seqlen_k=5, **spread_out), expected)
    sink = spread(torch.ones(3)).requires_grad_()
    leaf = torch.ones(3, requires_grad=True)
    outs = [flash_attn_func(q[None], q[None], q[None], learnable_sink=x).sum() for x in (sink, leaf)]
    torch.testing.assert_close(torch.autograd.grad(outs[0], sink), torch.autograd.grad(outs[1], leaf))


@pytest.mark.parametrize("name", ["learnable_sink", "s_aux", "alibi_slopes"])
def test_messages_name_the_argument_that_was_given(name: str) -> None:
    q = torch.randn(2, 4, 3, 8)
    with pytest.raises(RuntimeError, match=rf"^{name} must have shape .*\(3,\)"):
        flash_attn_func(q, q, q, **{name: torch.zeros(5)})
    with pytest.raises(RuntimeError, match=f"^{name} must be real"):
        flash_attn_func(q, q, q, **{name: torch.zeros(3, dtype=torch.complex64)})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["learnable_sink", "s_aux", "alibi_slopes"])
def test_messages_about_devices_name_the_argument_that_was_given(name: str) -> None:
    q = torch.randn(2, 4, 3, 8, device="cuda")
    with pytest.raises(RuntimeError, match=f"^{name} must be on q's device"):
        flash_attn_func(q, q, q, **{name: torch.zeros(3)})


def test_kinds_of_inputs_that_there_are_no_kernels_for() -> None:
    q = torch.randn(2, 4, 3, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"q must be .*float8_e4m3fn.*q.to\(torch.bfloat16\)"):
        flash_attn_func(*(q.to(torch.float8_e4m3fn),) * 3)
    with pytest.raises(NotImplementedError, match=r"q must be .*complex64"):
        flash_attn_varlen_func(*(q[0].to(torch.complex64),) * 3, starts, starts, 4, 4)
    with pytest.raises(RuntimeError, match=r"q must be .*int64"):
        flash_attn_func(*(q.long(),) * 3)
    nested = torch.nested.nested_tensor([q[0], q[1]], layout=torch.jagged)
    for function in (flash_attn_func, lambda *qkv: flash_attn_varlen_func(*qkv, starts, starts, 4, 4)):
        with pytest.raises(
            NotImplementedError, match=r"q must be a plain tensor, but is nested.*flash_attn_varlen_func"
        ):
            function(nested, nested, nested)


def test_dtensors_over_batch_and_heads() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not dist.is_available():
        pytest.skip("torch has no distributed package")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        q, starts = torch.randn(2, 5, 3, 8), torch.tensor([0, 5], dtype=torch.int32)
        for placement in (Shard(0), Shard(2), Replicate()):
            x = distribute_tensor(q, mesh, [placement]).requires_grad_()
            out = flash_attn_func(x, x, x, causal=True, window_size=(2, 0))
            assert out.placements == (placement,)
            torch.testing.assert_close(out.full_tensor(), flash_attn_func(q, q, q, causal=True, window_size=(2, 0)))
            out.sum().backward()
            assert x.grad is not None and x.grad.placements == (placement,)
        with pytest.raises(NotImplementedError, match=r"alibi_slopes must not be given with DTensors.*q.to_local"):
            flash_attn_func(x, x, x, alibi_slopes=torch.ones(3))
        with pytest.raises(NotImplementedError, match="return_lse must not be given with DTensors"):
            flash_attn_func(x, x, x, return_lse=True)
        with pytest.raises(NotImplementedError, match=r"q must not be a DTensor.*q.to_local"):
            flash_attn_varlen_func(x[0], x[0], x[0], starts, starts, 5, 5)
        x = distribute_tensor(q, mesh, [Shard(1)])
        with pytest.raises(
            NotImplementedError, match=r"q must be replicated or sharded over batch \(0\) or heads \(2\)"
        ):
            flash_attn_func(x, x, x)
    finally:
        dist.destroy_process_group()


def test_refusals() -> None:
    q = torch.randn(2, 4, 3, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="window_size"):
        flash_attn_func(q, q, q, window_size=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="s_aux"):
        flash_attn_func(q, q, q, learnable_sink=torch.zeros(3), s_aux=torch.zeros(3))
    with pytest.raises(RuntimeError, match="block_table"):
        flash_attn_varlen_func(q[0], q, q, starts, starts, 4, 4, block_table=torch.zeros(1, 1))
