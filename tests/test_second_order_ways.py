"""The ways to ask for second derivatives and forward mode: transforms, eager and compiled; gradients of gradients; dual
numbers; torch.autograd.functional; and what has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import flash_attn_varlen_func, prepare_mask, replace_sdpa, scaled_dot_product_attention


def _qkv(*sizes: int, requires_grad: bool = False) -> list[Tensor]:
    sizes = sizes or (2, 3, 7, 4)
    return [torch.randn(*sizes, dtype=torch.float64, requires_grad=requires_grad) for _ in range(3)]


def _defined(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    s = q @ k.mT / q.shape[-1] ** 0.5
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    return s.softmax(-1) @ v


def _op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    n = q.shape[2]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    rest = n, n, None, int(is_causal), -1, -1, 0.0, 0.0, True, False
    out: Tensor = torch.ops.flash_attn.forward(q, k, v, mask, *(None,) * 8, *rest)[0]
    return out


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def _transforms(attend: Callable[..., Tensor]) -> dict[str, tuple[Callable[..., Any], Tensor]]:
    torch.manual_seed(0)
    q, k, v = _qkv()
    one = [x[:1] for x in (q, k, v)]
    bias, mask = torch.randn(3, 7, 7, dtype=torch.float64), torch.rand(7, 7).fill_diagonal_(1.0) > 0.3

    def loss(q: Tensor, k: Tensor = k, v: Tensor = v, mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, mask, is_causal=mask is None).sin().sum()

    def of_one(q: Tensor) -> Tensor:
        return loss(q, *one[1:])

    def penalty(q: Tensor) -> Tensor:
        return grad(loss)(q).square().sum()

    return {
        "hessian": (hessian(of_one), one[0]),
        "jacfwd": (jacfwd(lambda q: attend(q, *one[1:])), one[0]),
        "jacrev of jacrev": (jacrev(jacrev(of_one)), one[0]),
        "forward over reverse": (lambda q: jvp(grad(loss), (q,), (k,)), q),
        "reverse over reverse": (lambda q: vjp(grad(loss), q)[1](k), q),
        "penalty": (grad(penalty), q),
        "penalty under vmap": (vmap(grad(penalty)), torch.stack((q, k))),
        "bias": (lambda b: jvp(grad(lambda b: loss(q, k, v, b)), (b,), (b.flip(0),)), bias),
        "bias, penalty": (grad(lambda b: grad(lambda b: loss(q, k, v, b))(b).square().sum()), bias),
        "bias under vmap": (
            vmap(lambda t: jvp(lambda b: attend(q, k, v, b), (bias,), (t,))),
            torch.stack((bias, -bias)),
        ),
        "bool mask": (grad(lambda q: grad(lambda q: loss(q, k, v, mask))(q).square().sum()), q),
        "bool mask, forward mode": (lambda q: jvp(lambda q: attend(q, k, v, mask), (q,), (k,)), q),
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attend", [scaled_dot_product_attention, _op])
@pytest.mark.parametrize("name", _transforms(_defined))
def test_transforms(name: str, attend: Callable[..., Tensor], compiled: bool) -> None:
    function, x = _transforms(attend)[name]
    expected, _ = _transforms(_defined)[name]
    torch.testing.assert_close((_compiled(function) if compiled else function)(x), expected(x))


@pytest.mark.parametrize("kind", ["", "bool", "float"])
@pytest.mark.parametrize("is_small", [True, False])
def test_gradients_of_gradients_in_eager_mode(kind: str, is_small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_small:
        monkeypatch.setattr("flash_attn.torch_op.extension.forward", None)
    leaves = _qkv(2, 3, 5, 8, requires_grad=True)
    mask: Any = None
    if kind:
        mask = torch.rand(5, 5).fill_diagonal_(1.0) > 0.3
    if kind == "float":
        mask = torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True)
        leaves.append(mask)
    weight = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)

    def second(attend: Callable[..., Tensor], call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = (call(lambda *x: attend(*x[:3], mask), *leaves).sin() * weight).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (*leaves, weight))

    def checkpointed(f: Callable[..., Tensor], *x: Tensor) -> Tensor:
        return checkpoint(f, *x, use_reentrant=False)

    expected = second(_defined, lambda f, *x: f(*x))
    for call in (lambda f, *x: f(*x), checkpointed):
        torch.testing.assert_close(second(scaled_dot_product_attention, call), expected)


def test_what_torch_autograd_functional_and_dual_numbers_make_of_it() -> None:
    q, k, v = _qkv()

    def results(attend: Callable[..., Tensor]) -> Any:
        def loss(q: Tensor) -> Tensor:
            return attend(q, k[:1], v[:1], is_causal=True).sin().sum()

        functional, one, direction = torch.autograd.functional, q[:1], k[:1]
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        first = torch.autograd.grad(attend(*leaves, is_causal=True).sin().sum(), leaves, create_graph=True)
        with forward_ad.dual_level():
            dual = attend(forward_ad.make_dual(q, k), k, forward_ad.make_dual(v, q), is_causal=True)
            tangent = forward_ad.unpack_dual(dual).tangent
        return (
            functional.hessian(loss, one),
            functional.hessian(loss, one, vectorize=True),
            functional.hvp(loss, one, direction),
            functional.vhp(loss, one, direction),
            functional.jvp(lambda q: attend(q, k, v), q, k),
            torch.autograd.grad(first, leaves, [torch.stack((x, -x)) for x in (k, v, q)], is_grads_batched=True),
            tangent,
        )

    torch.testing.assert_close(results(scaled_dot_product_attention), results(_defined))


def test_third_derivatives_and_forward_mode_twice_raise() -> None:
    q, k, v = _qkv(1, 2, 5, 4)

    def loss(q: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v).sin().sum()

    def penalty(q: Tensor) -> Tensor:
        return grad(loss)(q).square().sum()

    for third in (
        lambda q: grad(lambda q: grad(penalty)(q).square().sum())(q),
        lambda q: jvp(grad(penalty), (q,), (k,)),
        lambda q: jvp(lambda q: jvp(loss, (q,), (k,))[1], (q,), (k,)),
        lambda q: grad(lambda q: jvp(grad(loss), (q,), (k,))[1].sum())(q),
        jacrev(hessian(loss)),
    ):
        with pytest.raises(
            NotImplementedError, match=r"derivative for flash_attn::(for|back)ward_jvp is not implemented"
        ):
            third(q)
    q.requires_grad_()
    (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        (second.sum() + q.sum()).backward()


def test_replaced_sdpa_autocast_and_prepared_masks_have_second_derivatives() -> None:
    q, k, v = _qkv(2, 3, 9, 8)
    keep = torch.rand(2, 1, 1, 9) > 0.3
    keep[..., 0] = True
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def second(attend: Callable[[Tensor], Tensor]) -> Tensor:
        return jvp(grad(lambda q: attend(q).sin().sum()), (q,), (k,))[1]

    expected = second(lambda q: _defined(q, k, v, keep))
    mask = prepare_mask(keep)
    torch.testing.assert_close(second(lambda q: scaled_dot_product_attention(q, k, v, mask)), expected)
    with replace_sdpa():
        torch.testing.assert_close(
            second(lambda q: torch.nn.functional.scaled_dot_product_attention(q, k, v, keep)), expected
        )
        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(second(lambda q: sdpa(q, k, v, keep)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = second(lambda q: scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).double())
    assert 0 < float((rounded - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_packed_sequences_by_their_function() -> None:
    starts = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    q, k, v = _qkv(8, 2, 4)

    def packed(q: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, causal=True).sin().sum()

    def one_by_one(q: Tensor) -> Tensor:
        parts = [(x.transpose(0, 1) for x in (q[a:b], k[a:b], v[a:b])) for a, b in ((0, 3), (3, 8))]
        return torch.stack([_defined(*part, is_causal=True).sin().sum() for part in parts]).sum()

    torch.testing.assert_close(*(jvp(grad(f), (q,), (k,))[1] for f in (packed, one_by_one)))


def test_tangents_of_other_shapes_and_dtypes_are_refused() -> None:
    q, k, v = _qkv(1, 1, 5, 4)
    options = 5, 5, None, 0, -1, -1, 0.0, 0.0, True, False
    out, lse, _ = torch.ops.flash_attn.forward(q, k, v, *(None,) * 9, *options)
    for tangent in (q[..., :3], q.float()):
        with pytest.raises(RuntimeError, match=r"the tangent of k must be as k, torch.float64 of shape \(1, 1, 5, 4\)"):
            torch.ops.flash_attn.forward_jvp(None, tangent, *(None,) * 4, q, k, v, *(None,) * 9, out, lse, *options)


def test_flops_are_counted() -> None:
    q, k, v = _qkv(1, 2, 16, 8)
    product = 2 * 2 * 16 * 16 * 8
    with FlopCounterMode(display=False) as counter:
        jvp(lambda *x: scaled_dot_product_attention(*x), (q, k, v), (k, v, q))
    assert counter.get_total_flops() == (2 + 5) * product
    with FlopCounterMode(display=False) as counter:
        jvp(grad(lambda *x: scaled_dot_product_attention(*x).sum(), (0, 1, 2)), (q, k, v), (k, v, q))
    assert counter.get_total_flops() == (2 + 5 + 5 + 10) * product
