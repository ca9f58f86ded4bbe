"""The ops as torch sees them: opcheck, compile, counters, checkpointing, fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention
from flash_attn.torch_op import attention as ops

OPTIONS: dict[str, Any] = {
    "softmax_scale": None,
    "causal": 1,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
    "dropout_p": 0.0,
    "heads_first": True,
    "deterministic": False,
}


def _qkv(length: int = 9, requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _full_arguments(varlen: bool) -> tuple[list[Any], dict[str, Any]]:
    """Every tensor argument at once."""
    if varlen:
        q, k, v = (torch.randn(20, 4, 8, requires_grad=True) for _ in range(3))
        starts = torch.tensor([0, 8, 20], dtype=torch.int32)
        lengths: list[Any] = [starts, starts, None, torch.tensor([7, 10], dtype=torch.int32)]
    else:
        q, k, v = (torch.randn(2, 4, 12, 8, requires_grad=True) for _ in range(3))
        lengths = [None, None, torch.tensor([11, 12], dtype=torch.int32), None]
    mask = torch.randn(1, 4, 12, 12, requires_grad=True)
    slopes, sinks = torch.rand(4, requires_grad=True), torch.randn(4, requires_grad=True)
    tensors = [q, k, v, mask, slopes, sinks, None, *lengths, torch.tensor([1, 2])]
    options = {**OPTIONS, "max_seqlen_q": 12, "max_seqlen_k": 12, "dropout_p": 0.2, "heads_first": not varlen}
    return tensors, options


@pytest.mark.parametrize("varlen", [False, True])
def test_opcheck(varlen: bool) -> None:
    tensors, options = _full_arguments(varlen)
    torch.library.opcheck(torch.ops.flash_attn.forward.default, tuple(tensors), options)
    detached = [x.detach() if x is not None else None for x in tensors]
    out, lse, _ = torch.ops.flash_attn.forward(*detached, **options)
    arguments = (torch.randn_like(out), torch.randn_like(lse), *detached, out, lse)
    needs = {"needs": [True] * 6}
    torch.library.opcheck(torch.ops.flash_attn.backward.default, arguments, needs | options)


def test_a_compiled_training_step_has_one_graph_for_all_lengths() -> None:
    compiled = 0

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return module.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _ours(q, k, v).square().sum()

    for length in (9, 17, 33, 12, 64):
        q, k, v = _qkv(length)
        got = torch.autograd.grad(loss(q, k, v), (q, k, v))
        expected = torch.autograd.grad(_torchs(q, k, v).square().sum(), (q, k, v))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert compiled == 1


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compile_with_inductor_gives_the_same(dropout: float) -> None:
    @torch.compile(fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return scaled_dot_product_attention(q * 2, k, v, bias, dropout_p=dropout).square().sum()

    inputs = [*_qkv(dtype=torch.float32), torch.randn(3, 1, 9, requires_grad=True)]
    gradients = torch.autograd.grad(step(*inputs), inputs)
    assert all(torch.isfinite(x).all() for x in gradients)
    if dropout == 0.0:
        q, k, v, bias = inputs
        eager = torch.autograd.grad(scaled_dot_product_attention(q * 2, k, v, bias).square().sum(), inputs)
        for a, b in zip(gradients, eager, strict=True):
            torch.testing.assert_close(a, b)


def test_flop_counter_counts_as_for_torchs_function() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = _qkv(32)
    with FlopCounterMode(display=False) as ours:
        _ours(q, k, v).sum().backward()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward_math:
        _torchs(q.detach(), k.detach(), v.detach())
    assert ours.get_total_flops() == forward_math.get_total_flops() * 7 / 2


def test_selective_checkpointing_can_save_the_op() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    runs = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op == torch.ops.flash_attn.forward.default:
            runs.append(context.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = _qkv()
    out = checkpoint(
        lambda q: _ours(q * 2, k, v),
        q,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    got = torch.autograd.grad(out.sum(), q)
    torch.testing.assert_close(got, torch.autograd.grad(_torchs(q * 2, k, v).sum(), q))
    assert runs and runs[0] is False


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("saved", ["forward", "randint"])
def test_checkpointed_dropout_has_the_gradients_of_its_output(saved: str, preserve: bool) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = saved in str(op)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = _qkv()
    weight = torch.randn_like(v)
    out = checkpoint(
        lambda v: scaled_dot_product_attention(q, k, v * 2, dropout_p=0.5),
        v,
        use_reentrant=False,
        preserve_rng_state=preserve,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    (dv,) = torch.autograd.grad(out, v, weight)
    torch.testing.assert_close((dv * v).sum(), (out * weight).sum())  # out is linear in v


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = (torch.empty(2, 9, 3, 8, device="meta").transpose(1, 2) for _ in range(3))
    out = scaled_dot_product_attention(q, k, v[..., :5])
    assert out.is_meta and out.shape == (2, 3, 9, 5) and out.transpose(1, 2).is_contiguous()
    with FakeTensorMode():
        x = torch.randn(2, 3, 9, 8, requires_grad=True)
        scaled_dot_product_attention(x, x, x).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


def test_only_lse_used_gives_gradients() -> None:
    q, k, v = _qkv()
    _, lse = ops.attention(q, k, v, heads_first=True)
    got = torch.autograd.grad(lse.sum(), (q, k))
    scores = q @ k.transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(got, torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k)))


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(700, 700), (3, 5000)])
def test_results_do_not_depend_on_the_number_of_threads(seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = (torch.randn(1, 1, n, 32, requires_grad=True) for n in (seqlen_q, seqlen_k, seqlen_k))
    weight = torch.randn(1, 1, seqlen_q, 32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = _ours(q, k, v)
            results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3), (2, 0, 1, 3)])
def test_out_has_the_memory_order_of_q(order: tuple[int, ...]) -> None:
    q = torch.randn(3, 4, 5, 8).permute(order).contiguous().permute([order.index(i) for i in range(4)])
    out = scaled_dot_product_attention(q, q, q[..., :6])
    assert out.permute(order).is_contiguous()
    x = q.clone().requires_grad_()
    scaled_dot_product_attention(x, x, x).sum().backward()
    assert x.grad is not None and x.grad.permute(order).is_contiguous()


def _packed(x: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    x = x[keep]
    return flash_attn_varlen_func(x, x, x, starts, starts, 9, 9, causal=True)


def _longest_is_data(x: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    x, longest = x[keep], int(starts.diff().max().item())
    return flash_attn_varlen_func(x, x, x, starts, starts, longest, longest)


def _sequences_are_data(x: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    starts = starts[torch.tensor([True, False, True])]
    return flash_attn_varlen_func(x[keep], x, x, starts, starts, 12, 12)


def _length(x: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    x = x[keep].unsqueeze(0)
    return flash_attn_func(x, x, x, causal=True)


def _batch(x: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    x = x[keep].unsqueeze(1)
    return flash_attn_func(x, x, x)


def _heads_first(x: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    x = x[keep].transpose(0, 1)
    return scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)


def _queries_alone(x: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    q, k = x[keep].transpose(0, 1)[None], x.transpose(0, 1)[None]
    return scaled_dot_product_attention(q, k[:, :1], k[:, :1], enable_gqa=True)


def _keys_and_mask(x: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    q, k = x.transpose(0, 1)[None], x[keep].transpose(0, 1)[None]
    return scaled_dot_product_attention(q, k, k, torch.ones(12, k.shape[-2], dtype=torch.bool).tril(1))


@pytest.mark.parametrize(
    "attend",
    [
        _packed,
        _longest_is_data,
        _sequences_are_data,
        _length,
        _batch,
        _heads_first,
        _queries_alone,
        _keys_and_mask,
    ],
)
def test_sizes_known_only_at_run_time(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    x = torch.randn(12, 2, 8, dtype=torch.float64, requires_grad=True)
    options = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(**options):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(attend, fullgraph=True, backend=counter)
        for rows in (7, 2, 1, 12):
            keep = torch.arange(12) < rows
            starts = torch.tensor([0, rows // 3, rows], dtype=torch.int32)
            results = [f(x, keep, starts) for f in (compiled, attend)]
            torch.testing.assert_close(*results)
            assert results[0].stride() == results[1].stride() or rows == 1
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in results))
    assert counter.frame_count == 1


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3), (2, 0, 1, 3)])
@pytest.mark.parametrize("dim", range(3))
def test_strides_where_a_size_is_known_only_at_run_time(dim: int, order: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 4, 5, 8).permute(order).contiguous().permute([order.index(i) for i in range(4)])
    x.requires_grad_()
    torch._dynamo.decorators.mark_unbacked(x, dim)
    results = [
        f(x)
        for f in (
            torch.compile(lambda x: _ours(x, x, x), fullgraph=True, backend="aot_eager"),
            lambda x: _ours(x, x, x),
        )
    ]
    torch.testing.assert_close(*results, check_stride=True)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x) for y in results), check_stride=True)


def test_dispatch_modes_and_make_fx_see_both_ops() -> None:
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    def gradients(*x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_ours(*x).square().sum(), x)

    inputs = _qkv()
    with Seen():
        expected = gradients(*inputs)
    graph = make_fx(gradients)(*inputs)
    for names in (seen, [str(node.target) for node in graph.graph.nodes]):
        assert [name for name in names if "flash_attn" in name] == [
            "flash_attn.forward.default",
            "flash_attn.backward.default",
        ]
    torch.testing.assert_close(graph(*inputs), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_saved_tensors_pass_hooks(dropout: float) -> None:
    saved: list[Tensor] = []

    def pack(x: Tensor) -> int:
        saved.append(x.clone())
        return len(saved) - 1

    q, k, v = _qkv()
    slopes, rng_state = torch.rand(3, dtype=torch.float64), torch.tensor([1, 2])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: saved[i]):
        out, _ = ops.attention(q, k, v, alibi_slopes=slopes, rng_state=rng_state, dropout_p=dropout, heads_first=True)
    assert len(saved) == 7  # with out, lse and the seed
    rng_state.fill_(0)
    weight = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, weight)
    torch.testing.assert_close((dv * v).sum(), (out * weight).sum())


@pytest.mark.parametrize("compiled_forward", [False, True])
def test_compiled_autograd_has_one_graph(compiled_forward: bool) -> None:
    torch._dynamo.reset()
    leaves = _qkv()
    attend = torch.compile(_ours, fullgraph=True, backend="aot_eager") if compiled_forward else _ours
    with torch._dynamo.compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        attend(*leaves).square().sum().backward()
    expected = torch.autograd.grad(_torchs(*leaves).square().sum(), leaves)
    torch.testing.assert_close(tuple(x.grad for x in leaves), expected)
