"""The short way of eager calls with a mask: who takes it, and that it is the same as the long one.

It is torch's op for extensions, without which calls that require grad go the long way, and an op of ours for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.torch_op import attention as ops
from flash_attn.torch_op import extension, plain
from flash_attn.torch_op.arguments import PLAIN_WITHOUT_LSE, from_plain, plain_options
from flash_attn.torch_op.library import masked_forward_op
from flash_attn.torch_op.observer import Observer

pytestmark = pytest.mark.skipif(extension.forward is None, reason="torch's op for extensions is not ours to use")

SHORT = ("try_sdpa", "try_attend")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call with a mask was served by the short way."""
    served: list[bool] = []

    def recorded(attend: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def attend_and_tell(*args: Any) -> Tensor | None:
            out = attend(*args)
            served.append(out is not None)
            return out

        return attend_and_tell

    for name in SHORT:
        monkeypatch.setattr(plain, name, recorded(getattr(plain, name)))
    return served


def _leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


def _masks(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    seen = torch.rand(2, 3, 5, 5) < 0.6
    seen[..., 0] = True
    bias = torch.randn(1, 3, 5, 5, dtype=dtype)
    trained = [
        bias[:, :1],
        torch.nn.Parameter(bias[..., :1, :].contiguous()),
        bias[0, 0].contiguous(),
        bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),  # as T5 looks it up
        bias[:, :, :1].expand(-1, -1, 5, -1),
        torch.randn(3, 5, 7, dtype=dtype)[..., :5],
    ]
    for x in trained:
        x.requires_grad_()
    return [seen, seen[:, :1, :1], seen[:1], seen[0], seen[0, 0], seen[0, 0, 0], bias, bias[0], *trained]


NUM_MASKS = 14


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("i", range(NUM_MASKS))
def test_it_is_the_long_way_and_torchs_result(
    i: int, scale: float | None, is_causal: bool, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, mask = _leaves(), _masks()[i]
    wanted = [*leaves, *([mask] if mask.requires_grad else [])]
    weight = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def results(attend: Callable[..., Tensor], mask: Tensor, **options: Any) -> tuple[Tensor, ...]:
        out = attend(*leaves, mask, scale=scale, **options)
        with torch.no_grad():
            assert torch.equal(attend(*leaves, mask, scale=scale, **options), out)
        return (out, *torch.autograd.grad(out, wanted, weight))

    short = results(sdpa, mask, is_causal=is_causal)
    assert taken == [True, True]
    for name in SHORT:
        monkeypatch.setattr(plain, name, lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(short, results(sdpa, mask, is_causal=is_causal), strict=True))
    both = mask if mask.dim() > 1 else mask.expand(5, 5)  # torch's CPU kernel wants two
    if is_causal:  # torch takes one of them
        triangle = torch.ones(5, 5, dtype=torch.bool).tril()
        both = mask & triangle if mask.dtype == torch.bool else mask.masked_fill(~triangle, -torch.inf)
    torch.testing.assert_close(short, results(F.scaled_dot_product_attention, both))


@pytest.mark.parametrize("trained", [False, True])
def test_heads_that_share_keys(trained: bool, taken: list[bool]) -> None:
    q, _, _ = _leaves()
    k, v = (torch.randn(2, 1, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=trained)
    wanted = [q, k, v, mask][: 3 + trained]
    got = torch.autograd.grad(sdpa(q, k, v, mask, enable_gqa=True).square().sum(), wanted)
    assert taken == [True]
    out = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), mask)
    torch.testing.assert_close(got, torch.autograd.grad(out.square().sum(), wanted))


def test_other_shapes_and_dtypes_are_made_to_fit_it_first(taken: list[bool]) -> None:
    (q, k, v), seen = _leaves(), torch.ones(5, 5, dtype=torch.bool)
    sdpa(q, k[:1], v[:1], seen)
    with torch.autocast("cpu"):
        sdpa(q.float(), k.float(), v.float(), seen)
    sdpa(q[0], k[0], v[0], seen)
    assert taken == [False, True] * 3


def test_what_it_cannot_do_goes_the_long_way(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), seen = _leaves(), torch.ones(5, 5, dtype=torch.bool)
    sdpa(q, k, v, torch.zeros(1, 1, 5, 5))  # float32 beside float64
    with torch.inference_mode():
        inferred = seen.clone()
    sdpa(q, k, v, inferred)  # cannot be saved
    monkeypatch.setattr(extension, "LARGEST", q.numel() - 1)
    sdpa(q, k, v, seen)  # when memory runs out in its backward pass, that is said in torch's words
    monkeypatch.setattr(extension, "forward", None)
    sdpa(q, k, v, seen)
    for dropout_p in (0.5, 1.0):
        sdpa(q, k, v, seen, dropout_p)
    assert not any(taken)


@pytest.mark.parametrize("mask", _masks())
def test_without_gradients_it_is_an_op_of_its_own(mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, number = [x.detach() for x in _leaves()], plain_options(ops.NONE, True, False)
    out, lse = masked_forward_op(*leaves, mask.detach(), None, number)
    again, nothing = masked_forward_op(*leaves, mask.detach(), None, number | PLAIN_WITHOUT_LSE)
    assert nothing is None and lse.shape == (2, 3, 5) and torch.equal(again, out)
    monkeypatch.setattr(extension, "forward", None)  # which has no part in it
    with profile() as record, torch.no_grad():
        assert torch.equal(sdpa(*leaves, mask), out)
    names = [event.name for event in record.function_events if event.name.startswith(("flash_attn", "aten::_scaled"))]
    assert names == ["flash_attn::masked_forward"]


def test_an_older_vmap_sees_it_too() -> None:
    """That of is_grads_batched, in a derivative whose code calls it without gradients."""

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Tensor:  # type: ignore[override]
            return sdpa(dout, dout, dout, torch.eye(5, dtype=torch.bool))

    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 2, 3, 5, 8, dtype=torch.float64)
    (batched,) = torch.autograd.grad(Attend.apply(x), x, weights, is_grads_batched=True)
    torch.testing.assert_close(batched, weights)  # each row sees itself


def test_nor_what_is_wrong_which_has_its_own_words(taken: list[bool]) -> None:
    q, k, v = _leaves()
    with pytest.raises(RuntimeError, match="attn_mask must broadcast to"):
        sdpa(q, k, v, torch.ones(1, 1, 5, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="attn_mask must be bool, float32 or query's dtype"):
        sdpa(q, k, v, torch.zeros(1, 1, 5, 5, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="same last dimension"):
        sdpa(q, k[..., :4], v, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert not any(taken)


def test_under_autocast_that_changes_nothing_it_is_taken(taken: list[bool]) -> None:
    q, k, v = _leaves(torch.bfloat16)
    with torch.autocast("cpu"):
        for mask in _masks(torch.bfloat16):
            sdpa(q, k, v, mask)
        assert all(taken) and len(taken) == NUM_MASKS
        sdpa(q, k, v, torch.zeros(1, 1, 5, 5))  # which autocast rounds first
    assert taken[NUM_MASKS:] == [False, True]


def test_who_watches_sees_the_op(taken: list[bool]) -> None:
    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    seen: list[str] = []
    with Watcher():
        sdpa(*_leaves(), torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert not any(taken) and "flash_attn.forward.default" in seen


def test_gradients_are_repeatable_where_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    forward = extension.forward
    assert forward is not None
    monkeypatch.setattr(extension, "forward", lambda *x: given.append(int(-1 - x[4])) or forward(*x))
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            sdpa(*_leaves(), torch.ones(5, 5, dtype=torch.bool))
        finally:
            torch.use_deterministic_algorithms(False)
    q = torch.empty(2, 3, 5, 8)
    assert [from_plain(q, q, None, number).deterministic for number in given] == [False, True]


def test_memory_that_runs_out_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(*_: Any) -> Any:
        calls.append(1)
        raise RuntimeError("out of memory: flash_attn could not allocate out")

    monkeypatch.setattr(extension, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        sdpa(*_leaves(), torch.ones(5, 5, dtype=torch.bool))
    assert len(calls) == 1


def test_a_backward_pass_alone_is_explained() -> None:
    seen: list[Any] = []
    leaves, bias = _leaves(), _masks()[9]
    out = sdpa(*leaves, bias, is_causal=True)
    observer: Observer[None] = Observer(lambda *_: None, lambda _: None, seen.append, lambda _: None)
    with observer:
        gradients = torch.autograd.grad(out.sum(), [*leaves, bias])
    assert all(not x.any() and x.shape == y.shape for x, y in zip(gradients, [*leaves, bias], strict=True))
    (call,) = seen
    assert call.options.causal == ops.TOP_LEFT and call.needs == [True] * 4 + [False] * 2
    assert call.tensors.attn_mask.shape == bias.shape


def test_hooks_and_batched_gradients() -> None:
    leaves, bias = _leaves(), _masks()[9]
    wanted = [*leaves, bias]
    expected = torch.autograd.grad(sdpa(*leaves, bias).square().sum(), wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        out = sdpa(*leaves, bias)
    assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), wanted), expected))
    weights = torch.randn(4, 2, 3, 5, 8, dtype=torch.float64)
    out = sdpa(*leaves, bias)
    batched = torch.autograd.grad(out, wanted, weights, retain_graph=True, is_grads_batched=True)
    for i, weight in enumerate(weights):
        for a, b in zip(batched, torch.autograd.grad(out, wanted, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def test_compiled_autograd_has_one_graph() -> None:
    torch._dynamo.reset()
    leaves, masks = _leaves(), _masks()
    for mask in (masks[0], *masks[-4:]):
        wanted = [*leaves, *([mask] if mask.requires_grad else [])]
        expected = torch.autograd.grad(sdpa(*leaves, mask).square().sum(), wanted)
        for x in wanted:
            x.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
            sdpa(*leaves, mask).square().sum().backward()
        torch.testing.assert_close(tuple(x.grad for x in wanted), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [torch.randn(2, 3, n, 64, dtype=dtype, device="cuda", requires_grad=True) for n in (130, 200, 200)]
    bias, seen = (
        torch.randn(1, 3, 130, 200, dtype=dtype, device="cuda"),
        torch.rand(2, 1, 130, 200, device="cuda") < 0.6,
    )
    masks = [seen, seen[:, :, :1], seen[0, 0], bias, bias[:, :1, :1], bias.clone().requires_grad_()]
    masks.append(bias[:, :1].clone().requires_grad_())
    masks.append(bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_())
    weight = torch.randn_like(leaves[0])

    def results() -> list[tuple[Tensor, ...]]:
        outs = [sdpa(*leaves, mask) for mask in masks]
        wanted = [[*leaves, *([mask] if mask.requires_grad else [])] for mask in masks]
        return [(out, *torch.autograd.grad(out, some, weight)) for out, some in zip(outs, wanted, strict=True)]

    short = results()
    assert taken == [True] * len(masks)
    for name in SHORT:
        monkeypatch.setattr(plain, name, lambda *_: None)
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-10}[dtype]
    for got, expected in zip(short, results(), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
