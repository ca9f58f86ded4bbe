"""Second derivatives and forward mode of the op, against autograd on the definition: every feature, dtype and device.
The ways to ask for them are in test_second_order_ways.py."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.utils._pytree import tree_leaves

import reference
from flash_attn.torch_op import attention as ops
from flash_attn.torch_op.second_order import dropout
from problems import Inputs, Problem, make_inputs
from test_gradcheck import PROBLEMS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MORE_PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows without keys": {"causal": 2, "seqlen_q": 9},
    "bool mask": {"mask": "bool"},
    "bool mask of columns": {"mask": "bool", "mask_dims": (True, False, False, True)},
    "heads first": {"layout": "heads_first", "causal": 2},
    "strided": {"layout": "strided"},
    "lengths": {"used_q": True, "used_k": True, "causal": 2},
    "lengths and sinks": {"used_q": True, "used_k": True, "sinks": True},
    "rows of the lowest number": {"mask": "float", "mask_kind": "lowest"},
    "sparse bias": {"mask": "float", "mask_kind": "sparse"},
    "no keys": {"seqlen_k": 0, "sinks": True},
    "several tiles": {"seqlen_q": 150, "seqlen_k": 300, "heads": 4, "causal": 2, "mask": "bool", "dropout": 0.4},
    "several tiles, packed": {"packed": True, "slopes": "batch", "seqlen_q": 140, "seqlen_k": 290, "window": (20, 9)},
    "several tiles, all": {
        "seqlen_q": 140,
        "seqlen_k": 290,
        "causal": 2,
        "mask": "float",
        "mask_dims": (True, False, True, True),
        "softcap": 2.0,
        "slopes": "batch",
        "sinks": True,
        "dropout": 0.2,
        "heads": 4,
        "used_k": True,
    },
}
Attend = Callable[..., tuple[Tensor, Tensor]]
Together = Callable[..., tuple[Tensor, ...]]


def _finite(results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = results
    return out, torch.where(torch.isinf(lse), 0.0, lse)


def _of_leaves(attend: Attend, inputs: Inputs, dtype: torch.dtype | None = None, device: str | None = None) -> Together:
    """`attend` as a function of what is differentiated."""
    rest = {
        name: x.detach().to(device or x.device, dtype if x.is_floating_point() and dtype else x.dtype)
        for name, x in inputs.tensors.items()
    }

    def of_leaves(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return _finite(attend(**rest | dict(zip(inputs.leaves, leaves, strict=True)), **inputs.options))

    return of_leaves


def _derivatives(f: Together, x: tuple[Any, ...], t: tuple[Any, ...], w: tuple[Any, ...], tw: tuple[Any, ...]) -> Any:
    """Forward mode, reverse over reverse, forward over reverse and reverse over forward."""

    def gradients(x: tuple[Any, ...], w: tuple[Any, ...]) -> Any:
        return vjp(f, *x)[1](w)

    return {
        "jvp": jvp(f, x, t)[1],
        "reverse over reverse": vjp(gradients, x, w)[1](t),
        "forward over reverse": jvp(gradients, (x, w), (t, tw))[1],
        "reverse over forward": vjp(lambda x, t: jvp(f, x, t)[1], x, t)[1](w),
    }


def _leaves(tree: Any) -> list[Tensor]:
    return [torch.zeros(()) if x is None else x for x in tree_leaves(tree, is_leaf=lambda x: x is None)]


def _directions(f: Together, x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    results = f(*x)
    return tuple(tuple(torch.randn_like(y) for y in like) for like in (x, results, results))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PROBLEMS | MORE_PROBLEMS)
def test_every_second_derivative_is_that_of_the_definition(name: str, device: str) -> None:
    sizes: dict[str, Any] = {"seqlen_q": 5, "seqlen_k": 6, "head_dim": 4, "head_dim_v": 4}
    inputs = make_inputs(Problem(dtype=torch.float64, **sizes | (PROBLEMS | MORE_PROBLEMS)[name]), device)
    x = tuple(y.detach() for y in inputs.leaves.values())
    ours, truth = _of_leaves(ops.attention, inputs), _of_leaves(reference.attention, inputs, device="cpu")
    directions = _directions(ours, x)
    got = _derivatives(ours, x, *directions)
    expected = _derivatives(truth, *(tuple(y.cpu() for y in d) for d in (x, *directions)))
    for kind in expected:
        for a, b in zip(_leaves(got[kind]), _leaves(expected[kind]), strict=True):
            torch.testing.assert_close(a.cpu().expand(b.shape) if a.dim() == 0 else a.cpu(), b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"causal": 1, "heads": 4}, {"mask": "float", "dropout": 0.3, "sinks": True}])
def test_errors_are_about_those_of_plain_operations(dtype: torch.dtype, changes: dict[str, Any], device: str) -> None:
    inputs = make_inputs(
        Problem(dtype=dtype, seqlen_q=150, seqlen_k=260, head_dim=64, head_dim_v=64, **changes), device
    )
    x = tuple(y.detach() for y in inputs.leaves.values())
    ours = _of_leaves(ops.attention, inputs)
    directions = _directions(ours, x)
    got = _derivatives(ours, x, *directions)

    def on_cpu(dtype: torch.dtype) -> Any:
        arguments = (tuple(y.to("cpu", dtype) for y in d) for d in (x, *directions))
        return _derivatives(_of_leaves(reference.attention, inputs, dtype, "cpu"), *arguments)

    truth, eager = on_cpu(torch.float64), on_cpu(dtype)
    for kind in truth:
        for a, b, c in zip(_leaves(got[kind]), _leaves(truth[kind]), _leaves(eager[kind]), strict=True):
            factor = 2.0 if kind == "jvp" else 3.0
            reference.assert_close(kind, a.expand(b.shape) if a.dim() == 0 else a, b, c, factor, dtype)


def test_dropout_is_that_of_the_kernels() -> None:
    state = torch.tensor([-(2**61) + 12345, 2**60 + 7])
    for p in (0.1, 0.5, 0.999, 1.0):
        truth = reference.dropout_factor(state, p, 2, 3, 1, 70, 300)
        kept, scale = dropout.kept(state, p, torch.arange(3) + 3, slice(16, 70), slice(128, 300))
        assert torch.equal(kept.double() * scale, truth[:, 16:70, 128:300])


def test_what_nobody_sees_may_be_nan() -> None:
    q, k, v = (torch.randn(2, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    used = torch.tensor([4, 2], dtype=torch.int32)
    unseen = torch.arange(6)[None, :] >= used[:, None]

    def second(nan: float) -> tuple[Tensor, ...]:
        def spoilt(x: Tensor) -> Tensor:
            return x.masked_fill(unseen[:, None, :, None], nan)

        def of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(q, k, v, seqused_q=used, seqused_k=used, heads_first=True)[0].sin().sum()

        inputs = tuple(spoilt(x.detach()).requires_grad_() for x in (q, k, v))
        first = torch.autograd.grad(of(*inputs), inputs, create_graph=True)
        second = torch.autograd.grad(first, inputs, [spoilt(x.detach()) for x in (k, v, q)])
        return (*second, jvp(of, tuple(x.detach() for x in inputs), tuple(spoilt(x.detach()) for x in (k, v, q)))[1])

    torch.testing.assert_close(second(torch.nan), second(0.0))


_PROGRAM = """
    import resource
    import torch
    from flash_attn import scaled_dot_product_attention

    def peak():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))

    def second(n):
        x = [torch.randn(1, 1, n, 16).requires_grad_() for _ in range(3)]
        first = torch.autograd.grad(scaled_dot_product_attention(*x).sum(), x, create_graph=True)
        return torch.autograd.grad(sum(y.sum() for y in first), x)

    second(256)
    before = peak()
    second(8192)
    print(peak() - before)
"""


def test_memory_is_linear() -> None:
    """A matrix of scores would have 256 MiB, and there would be several."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PROGRAM)], capture_output=True, text=True, cwd="/", check=True
    )
    assert int(result.stdout) < 64 << 20
