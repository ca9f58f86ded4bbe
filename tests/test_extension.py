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

from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.torch_op import attention as ops
from flash_attn.torch_op import extension, plain, private
from flash_attn.torch_op.observer import Observer

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
