"""Function transforms and mapped gradients, in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import grad, vjp, vmap

from flash_attn import flash_attn_varlen_func, scaled_dot_product_attention
from flash_attn.torch_op import attention as ops
from flash_attn.torch_op import private
from problems import Problem, make_inputs


def _qkv(length: int = 9) -> list[Tensor]:
    return [torch.randn(2, 3, length, 8, dtype=torch.float64) for _ in range(3)]


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    out: Tensor = torch.ops.flash_attn.forward(
        q, k, v, *(None,) * 9, n, n, None, ops.TOP_LEFT, -1, -1, 0.0, 0.0, True, False
    )[0]
    return out


def _torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_func_grad_vmap_and_both_nestings() -> None:
    q, k, v = _qkv()
    weight = torch.randn_like(q)

    def loss(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: (attend(q, k, v) * weight).sum()

    close(grad(loss(_ours), (0, 1, 2))(q, k, v), grad(loss(_torchs), (0, 1, 2))(q, k, v))
    qs, ks, vs = (torch.stack((x, 2 * x, x + 1)) for x in (q, k, v))
    close(vmap(_ours)(qs, ks, vs), torch.stack([_torchs(*x) for x in zip(qs, ks, vs, strict=True)]))
    close(vmap(_ours, (0, None, None))(qs, k, v), torch.stack([_torchs(x, k, v) for x in qs]))
    close(
        vmap(_ours, (None, 1, 1), 2)(q, ks.movedim(0, 1), vs.movedim(0, 1)).movedim(2, 0),
        vmap(_torchs, (None, 0, 0))(q, ks, vs),
    )
    per_sample = [grad(loss(_torchs), (0, 1, 2))(a, k, b) for a, b in zip(qs, vs, strict=True)]
    close(
        vmap(grad(loss(_ours), (0, 1, 2)), (0, None, 0))(qs, k, vs),
        tuple(torch.stack(x) for x in zip(*per_sample, strict=True)),
    )
    close(
        grad(lambda *x: vmap(loss(_ours))(*x).sum(), (0, 1, 2))(qs, ks, vs),
        grad(lambda *x: vmap(loss(_torchs))(*x).sum(), (0, 1, 2))(qs, ks, vs),
    )
    close(vmap(vmap(_ours))(*(x.unsqueeze(0) for x in (qs, ks, vs))), vmap(_ours)(qs, ks, vs).unsqueeze(0))


def test_vmap_over_masks_slopes_and_packed_sequences() -> None:
    q, k, v = _qkv()
    masks = torch.randn(4, 3, 9, 9, dtype=torch.float64)

    def with_mask(mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask)

    torch.testing.assert_close(vmap(with_mask)(masks), torch.stack([with_mask(m) for m in masks]))
    loss = grad(lambda mask: with_mask(mask).square().sum())
    torch.testing.assert_close(vmap(loss)(masks), torch.stack([loss(m) for m in masks]))
    slopes = torch.rand(4, 3, dtype=torch.float64)

    def with_slopes(slopes: Tensor) -> Tensor:
        return ops.attention(q, k, v, None, slopes, heads_first=True)[0]

    torch.testing.assert_close(vmap(with_slopes)(slopes), torch.stack([with_slopes(s) for s in slopes]))
    packed = torch.randn(4, 20, 2, 8)
    starts = torch.tensor([0, 8, 20], dtype=torch.int32)

    def with_packed(x: Tensor) -> Tensor:
        options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 12, "max_seqlen_k": 12}
        return ops.attention(x, x, x, **options)[0]

    torch.testing.assert_close(vmap(with_packed)(packed), torch.stack([with_packed(x) for x in packed]))


def test_dropout_under_vmap_follows_its_randomness() -> None:
    x = torch.randn(3, 1, 2, 16, 8)

    def attend(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(attend)(x)
    same = vmap(attend, randomness="same")(x[:1].expand(3, -1, -1, -1, -1))
    assert torch.equal(same[0], same[1])
    different = vmap(attend, randomness="different")(x[:1].expand(3, -1, -1, -1, -1))
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("attend", [_ours, _op])
def test_compiled_transforms(attend: Callable[..., Tensor]) -> None:
    q, k, v = _qkv(5)
    weight = torch.randn_like(q)

    def gradients(attend: Callable[..., Tensor]) -> Callable[..., Any]:
        return grad(lambda *x: (attend(*x) * weight).sum(), (0, 1, 2))

    def pulled_back(attend: Callable[..., Tensor]) -> Callable[..., Any]:
        def function(*x: Tensor) -> Any:
            out, pull_back = vjp(attend, *x)
            return out, pull_back(weight)

        return function

    def per_sample(attend: Callable[..., Tensor]) -> Callable[..., Any]:
        return vmap(lambda *x: gradients(attend)(*x), (0, None, 0))

    for transform in (gradients, pulled_back):
        close(_compiled(transform(attend))(q, k, v), transform(_torchs)(q, k, v))
    qs, vs = torch.stack((q, k)), torch.stack((v, weight))
    close(_compiled(per_sample(attend))(qs, k, vs), per_sample(_torchs)(qs, k, vs))


@pytest.mark.parametrize("attend", [_ours, _op])
def test_mapped_gradients(attend: Callable[..., Tensor]) -> None:
    leaves = [x.requires_grad_() for x in _qkv(5)]
    weights = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64)

    def mapped(attend: Callable[..., Tensor], **options: bool) -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, weights, is_grads_batched=True, **options)

    expected = mapped(_torchs)
    close(mapped(attend), expected)
    close(tuple(x.detach() for x in mapped(attend, create_graph=True)), expected)
    out = attend(*leaves)
    close(vmap(lambda w: torch.autograd.grad(out, leaves, w, retain_graph=True))(weights), expected)
    close(jacobian(attend, tuple(leaves), vectorize=True), jacobian(_torchs, tuple(leaves)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mapped_gradients_in_threads_of_autograd(device: str) -> None:
    """Which run backward passes on GPUs, and do not know that anything is mapped."""
    q, k, v = (x.to(device).requires_grad_() for x in _qkv(5))
    bias = torch.randn(5, 5, device=device, requires_grad=True)  # float32, beside float64: no short way
    weights = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64, device=device)
    for inputs, out in (((q, k, v), _ours(q, k, v)), ((q, bias), scaled_dot_product_attention(q, k, v, bias))):
        expected = [torch.autograd.grad(out, inputs, w, retain_graph=True) for w in weights]
        got = torch.autograd.grad(out, inputs, weights, is_grads_batched=True)
        close(got, tuple(map(torch.stack, zip(*expected, strict=True))))


def test_a_thread_that_is_not_told_of_a_mapping() -> None:
    if not private.older_vmap:
        pytest.skip("this torch has functorch's vmap alone")
    q, k, v = _qkv(5)
    mapped = torch._add_batch_dim(torch.stack((q, k)), 0, 3)
    with ThreadPoolExecutor(1) as pool:
        level, size, dims, plain = pool.submit(private.unwrap_batched, (None, mapped, v)).result()
    assert (level, size, dims) == (3, 2, [None, 0, None]) and torch.equal(plain[1], torch.stack((q, k)))


@pytest.mark.parametrize(
    "changes",
    [{"packed": True}, {"mask": "float", "slopes": "batch", "sinks": True}, {"dropout": 0.3}, {"used_k": True}],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 3])
def test_mapped_gradients_of_all_that_has_one(changes: dict[str, Any], size: int) -> None:
    sizes = {"seqlen_q": 5, "seqlen_k": 6, "head_dim": 4, "head_dim_v": 4, "dtype": torch.float64}
    inputs = make_inputs(Problem(**(sizes | changes)), "cpu")
    results = ops.attention(**inputs.tensors, **inputs.options)
    leaves = list(inputs.leaves.values())
    weights = [torch.randn(size, *x.shape, dtype=x.dtype) for x in results]

    def gradients(weights: Any, mapped: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results, leaves, weights, retain_graph=True, is_grads_batched=mapped)

    one_by_one = [gradients(w, False) for w in zip(*weights, strict=True)]
    close(gradients(weights, True), tuple(torch.stack(x) for x in zip(*one_by_one, strict=True)))


def test_the_older_vmap_around_another() -> None:
    if not private.older_vmap:
        pytest.skip("this torch has functorch's vmap alone")
    from torch._vmap_internals import _vmap

    q, k, v = (x.requires_grad_() for x in _qkv(5))
    weights, factors = torch.randn(4, 2, 3, 5, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    out = _ours(q, k, v)

    def gradient(weight: Tensor) -> Tensor:
        return torch.autograd.grad(out, q, weight, retain_graph=True)[0]

    mapped = _vmap(lambda w: _vmap(lambda factor: gradient(w) * factor)(factors))(weights)
    close(mapped, torch.stack([torch.stack([gradient(w) * factor for factor in factors]) for w in weights]))


def test_inference_tensors_that_are_only_read() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(5))
    x = torch.randn(5, 2, 8, requires_grad=True)
    with torch.inference_mode():
        square, column = torch.ones(5, 5, dtype=torch.bool).tril(), torch.ones(5, 1, dtype=torch.bool).expand(5, 5)
        bias, slopes = torch.randn(5, 5, dtype=torch.float64), torch.rand(2)
        starts, seed, used = torch.tensor([0, 2, 5]).int(), torch.tensor([3, 4]), torch.tensor([2, 1]).int()

    def packed(starts: Tensor, slopes: Tensor, used: Tensor) -> Tensor:
        return flash_attn_varlen_func(x, x, x, starts, starts, 3, 3, alibi_slopes=slopes, seqused_k=used)

    def seeded(seed: Tensor) -> Tensor:
        return ops.attention(q, k, v, rng_state=seed, dropout_p=0.4)[0]

    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]] = [
        (packed, (starts, slopes, used), (x,)),
        (seeded, (seed,), (q, k, v)),
        *((lambda m: scaled_dot_product_attention(q, k, v, m), (m,), (q, k, v)) for m in (square, column, bias)),
    ]
    for function, made, leaves in calls:
        results = [torch.autograd.grad(function(*y).sum(), leaves) for y in (made, [m.clone() for m in made])]
        close(*results)

    def mapped(masks: Tensor) -> Tensor:
        return vmap(grad(lambda q, m: scaled_dot_product_attention(q, k, v, m).sum()), (None, 0))(q, masks)

    close(mapped(square.expand(3, 5, 5)), mapped(square.clone().expand(3, 5, 5)))
    with torch.inference_mode():
        keys = k * 1
    for attend in (_ours, _torchs):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            attend(q, keys, v)
