"""torch's op for extensions, in which small eager calls that require grad have a derivative in C++."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import flash_attn_func
from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.torch_op import attention as ops
from flash_attn.torch_op import extension, plain, private
from flash_attn.torch_op.arguments import plain_options, split_backward
from flash_attn.torch_op.observer import Observer
from problems import CutGradient

NAME = "_scaled_dot_product_fused_attention_overrideable"


def _leaves() -> list[Tensor]:
    return [torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return sdpa(q, k, v, is_causal=True, **options)


@pytest.mark.parametrize("more", [0, 1])
def test_large_calls_have_the_function_which_knows_more_errors(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 1, extension.LARGEST // 128 + more, 128, requires_grad=True)
    taken = []
    monkeypatch.setattr(extension, "forward", lambda *_: taken.append(0) or (q, None, None, None, extension.MARK))
    monkeypatch.setattr(plain, "_apply", lambda *_: taken.append(1) or q)
    _sdpa(q, q, q)
    assert taken == [more]


def test_where_anothers_kernel_answers_in_place_of_ours_it_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def anothers(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
        calls.append(1)
        return q * 0, None, None, None, q.shape[2], k.shape[2], None, None, None

    monkeypatch.setattr(extension, "forward", anothers)
    leaves = _leaves()
    for _ in range(2):
        got = torch.autograd.grad(_sdpa(*leaves).square().sum(), leaves)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True).square().sum(), leaves)
    torch.testing.assert_close(got, expected)
    assert len(calls) == 1 and extension.forward is None


def test_calls_of_others_are_refused() -> None:
    for dropout_p in (0.0, 0.5):
        with pytest.raises(RuntimeError, match="takes calls of flash_attn alone"):
            getattr(torch.ops.aten, NAME)(*_leaves(), None, dropout_p)


def test_kernels_are_added_to_the_op_that_is_known_alone() -> None:
    (name, schema), _ = extension._SCHEMAS.items()
    assert private.is_free({name: schema}, "XPU")
    assert not private.is_free({name: schema.replace("SymInt max_q", "int max_q")}, "XPU")
    assert not private.is_free({name + "_of_tomorrow": schema}, "XPU")
    assert not private.is_free({name: schema}, "CPU")  # there ours are


def test_without_that_op_the_function_serves() -> None:
    code = """if True:
        import torch, flash_attn
        from flash_attn.torch_op import extension
        q = torch.randn(2, 3, 5, 8, requires_grad=True)
        out = flash_attn.scaled_dot_product_attention(q, q, q)
        out.sum().backward()
        print(extension.forward, type(out.grad_fn).__name__, end="")
    """
    environment = {**os.environ, "FLASH_ATTN_EXTENSION_OP": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment)
    assert result.stdout == "None PlainAttentionBackward", result.stderr


def test_flops_of_a_backward_pass_are_counted() -> None:
    leaves, totals = _leaves(), []
    for attend in (_sdpa, lambda *x: _sdpa(*x, attn_mask=torch.ones(5, 5, dtype=torch.bool))):
        out = attend(*leaves)
        with FlopCounterMode(display=False) as flops:
            out.sum().backward()
        totals.append(flops.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_a_backward_pass_alone_is_explained() -> None:
    seen: list[Any] = []
    leaves = _leaves()
    out = _sdpa(*leaves)
    observer: Observer[None] = Observer(lambda *_: None, lambda _: None, seen.append, lambda _: None)
    with observer:
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(not x.any() and x.shape == y.shape for x, y in zip(gradients, leaves, strict=True))
    assert len(seen) == 1 and seen[0].options.causal == ops.TOP_LEFT and seen[0].needs[:4] == [True, True, True, False]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "attend",
    [
        sdpa,
        lambda q, k, v: sdpa(q, k, v, torch.zeros(5, 5, dtype=q.dtype, device=q.device, requires_grad=True)),
        lambda q, k, v: sdpa(q, k, v, dropout_p=0.5),
        flash_attn_func,
        lambda q, k, v: flash_attn_func(q, k, v, return_lse=True)[1],
    ],
)
def test_a_gradient_that_is_none_has_none(
    attend: Any, large: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(extension, "LARGEST", 0)
    leaves = [x.detach().to(device).requires_grad_() for x in _leaves()]
    out = attend(*leaves)
    cut = CutGradient.apply(out).sum()
    cut.backward(retain_graph=True)
    with FlopCounterMode(display=False) as flops:
        cut.backward(retain_graph=True)
    observer: Observer[None] = Observer(lambda *_: None, lambda _: None, lambda _: pytest.fail(), lambda _: None)
    with observer:
        cut.backward()
    assert flops.get_total_flops() == 0 and all(x.grad is None for x in leaves)


DROPPING = [
    lambda q, k, v, dropout_p: sdpa(q, k, v, None, dropout_p, is_causal=True, scale=0.3),
    lambda q, k, v, dropout_p: sdpa(q, k, v, torch.ones(5, dtype=torch.bool), dropout_p),
    lambda q, k, v, dropout_p: flash_attn_func(q, k, v, dropout_p),
]


def _dropped(attend: Any, leaves: list[Tensor], dropout_p: float) -> list[Tensor]:
    torch.manual_seed(3)
    out = attend(*leaves, dropout_p)
    after = torch.rand(())  # as many numbers were drawn
    return [out, after, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape).double())]


@pytest.mark.parametrize("attend", DROPPING)
@pytest.mark.parametrize("dropout_p", [0.25, 0.5, 0.875])
def test_dropout_is_drawn_as_on_the_long_way(attend: Any, dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, taken = _leaves(), []
    forward = extension.forward

    def recorded(*arguments: Any, **options: Any) -> Any:
        taken.append(arguments[4])
        return forward(*arguments, **options)  # type: ignore[misc] # it is there

    monkeypatch.setattr(extension, "forward", recorded)
    short = _dropped(attend, leaves, dropout_p)
    assert len(taken) == 1
    for name in ("try_sdpa", "try_attend"):
        monkeypatch.setattr(plain, name, lambda *_: None)
    long = _dropped(attend, leaves, dropout_p)
    assert len(taken) == 1
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    assert not torch.equal(short[0], _dropped(attend, leaves, 0.0)[0])


@pytest.mark.parametrize("dropout_p", [0.1, 0.3, 0.7, 1 - 2**-20])
def test_the_share_that_is_dropped_comes_back_from_beside_the_options(dropout_p: float) -> None:
    q, state = torch.empty(2, 3, 5, 8), torch.empty(2, dtype=torch.int64)
    number = plain_options(ops.TOP_LEFT, True, True)
    given = (q, q, q, q, None, [True] * 4, q, None, None, None, 0, 0, -1.0 - number - dropout_p, False, state, None)
    arguments = split_backward(extension.of_backward(*given))
    assert arguments.options.dropout_p == pytest.approx(dropout_p, abs=1e-14)
    assert arguments.options.deterministic and arguments.options.causal == ops.TOP_LEFT
    assert arguments.tensors.rng_state is state


@pytest.mark.parametrize("dropout_p", [1, 1.0, 1 - 2**-53, 1 - 2**-40])
def test_everything_is_dropped_the_long_way(dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "forward", lambda *_: pytest.fail("the short way"))
    leaves = _leaves()
    out = sdpa(*leaves, None, dropout_p)
    assert not out.any() and not any(x.any() for x in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("dropout_p", [5e-324, 1e-20, 2**-40, 1 - 2**-40, 1 - 2**-53])
@pytest.mark.parametrize("causal", [False, True])
def test_a_share_of_almost_nothing_or_everything_is_no_other_call(dropout_p: float, causal: bool) -> None:
    """As it would be if it were rounded beside the options."""
    leaves, results = _leaves(), []
    for grad in (True, False):
        torch.manual_seed(4)
        with torch.set_grad_enabled(grad):
            results += [sdpa(*leaves, None, dropout_p, causal), torch.rand(())]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_a_wrong_share_has_its_own_words() -> None:
    for dropout_p in (-0.1, 1.5, float("nan")):
        with pytest.raises(RuntimeError, match="dropout_p must be in"):
            sdpa(*_leaves(), None, dropout_p)
