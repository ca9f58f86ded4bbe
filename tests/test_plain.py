"""The short way of eager calls of q, k and v alone: who takes it, and that it is the same as the long one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import profile
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn
from flash_attn.torch_op import arguments, extension, plain, private
from flash_attn.torch_op import attention as ops
from flash_attn.torch_op.library import plain_backward_op, plain_forward_op

LONG = ["forward", "backward"]
EXTENSION = "_scaled_dot_product_fused_attention_overrideable"
SHORT = {"extension": [EXTENSION, EXTENSION + "_backward"], "function": ["plain_forward", "plain_backward"]}


@pytest.fixture(autouse=True, params=SHORT)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of calls that require grad: small ones have torch's op for extensions, others an autograd function."""
    if request.param == "function":
        monkeypatch.setattr(extension, "LARGEST", -1)
    return str(request.param)


def _leaves(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape or (2, 3, 5, 8), dtype=torch.float64, requires_grad=True) for _ in range(3)]


def _ops_of(run: Callable[[], Any]) -> list[str]:
    with profile() as record:
        run()
    names = [event.name for event in sorted(record.function_events, key=lambda event: event.time_range.start)]
    return [name.split("::")[1] for name in names if name.startswith(("flash_attn::", f"aten::{EXTENSION}"))]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return flash_attn.scaled_dot_product_attention(q, k, v, is_causal=True, **options)


def _func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return flash_attn.flash_attn_func(q, k, v, causal=True, **options)


def _replaced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with flash_attn.replace_sdpa():
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("attend", [_sdpa, _func, _replaced])
def test_plain_calls_go_the_short_way(attend: Callable[..., Tensor], way: str) -> None:
    q, k, v = _leaves()
    assert _ops_of(lambda: attend(q, k, v).sum().backward()) == SHORT[way]
    with torch.no_grad():
        assert _ops_of(lambda: attend(q, k, v)) == ["plain_forward"]


def test_so_do_other_lengths_shared_heads_more_dimensions_and_autocast(way: str) -> None:
    q, k, v = _leaves()
    for function in (
        lambda: _sdpa(q[:, :, :1], k, v),
        lambda: _sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
        lambda: _sdpa(q[0], k[0], v[0]),
        lambda: _sdpa(q.float(), k.float(), v.float()),
        lambda: _func(q, k[:, :, :1], v[:, :, :1]),
    ):
        with torch.autocast("cpu"):
            assert _ops_of(lambda function=function: function().sum().backward()) == SHORT[way]


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: _sdpa(q, k, v, attn_mask=torch.zeros(5, 5)),
        lambda q, k, v: _sdpa(q, k, v, dropout_p=1.0),
        lambda q, k, v: _func(q, k, v, softcap=2.0),
        lambda q, k, v: _func(q, k, v, return_lse=True)[1],
        lambda q, k, v: _func(q, k, v, window_size=(1, -1)),
        lambda q, k, v: _func(q, k, v, alibi_slopes=torch.ones(5)),
        lambda q, k, v: _func(q, k, v, learnable_sink=torch.ones(5)),
    ],
)
def test_others_go_the_long_way(call: Callable[..., Tensor]) -> None:
    q, k, v = _leaves()
    assert _ops_of(lambda: call(q, k, v).sum().backward()) == LONG


@pytest.mark.parametrize("attend", [_sdpa, _func])
def test_dropout_has_torchs_op_alone(attend: Callable[..., Tensor], way: str) -> None:
    q, k, v = _leaves()
    expected = SHORT[way] if way == "extension" else LONG
    assert _ops_of(lambda: attend(q, k, v, dropout_p=0.5).sum().backward()) == expected
    assert _ops_of(lambda: attend(q.detach(), k.detach(), v.detach(), dropout_p=0.5)) == LONG[:1]


@pytest.mark.parametrize("causal", [ops.NONE, ops.TOP_LEFT, ops.BOTTOM_RIGHT])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_both_ways_are_equal(causal: int, heads_first: bool, scale: float | None) -> None:
    q, k, v = _leaves(2, 4, 6, 8)
    if heads_first:
        k, v = (x[:, :, :5] for x in (k, v))
    long, _ = ops.attention(q, k, v, softmax_scale=scale, causal=causal, heads_first=heads_first)
    short = plain.try_attend(q, k, v, None, scale, arguments.plain_options(causal, heads_first, False), 0.0)
    assert short is not None
    assert torch.equal(short, long) and short.stride() == long.stride()
    weight = torch.randn_like(long)
    for wanted in ((q, k, v), (k,), (q, v)):
        got, expected = (torch.autograd.grad(x, wanted, weight, retain_graph=True) for x in (short, long))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_only_some_inputs_require_grad() -> None:
    q, k, v = _leaves()
    k = k.detach()
    got = torch.autograd.grad(_sdpa(q, k, v).square().sum(), (q, v))
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum(), (q, v))
    torch.testing.assert_close(got, expected)


class _Watcher(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "flash_attn" or EXTENSION in op._schema.name:
            self.seen.append(op._schema.name.split("::")[1])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("attend", [_sdpa, _func])
def test_who_watches_one_pass_sees_the_op_of_it(attend: Callable[..., Tensor], way: str) -> None:
    leaves = _leaves()
    with _Watcher() as watcher:
        loss = attend(*leaves).square().sum()
    assert watcher.seen == LONG[:1]
    expected = torch.autograd.grad(loss, leaves)
    loss = attend(*leaves).square().sum()
    with _Watcher() as watcher:
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True))
    assert watcher.seen == (SHORT if way == "extension" else {way: LONG})[way][1:]


@pytest.mark.parametrize("attend", [_sdpa, _func, _replaced])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_sees_the_ops_of_both_passes(attend: Callable[..., Tensor], pre_dispatch: bool) -> None:
    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves).square().sum(), leaves)

    leaves = _leaves()
    graph = make_fx(gradients, pre_dispatch=pre_dispatch)(*leaves)
    names = [str(node.target) for node in graph.graph.nodes]
    assert [name for name in names if name.startswith("flash_attn.")] == [f"flash_attn.{name}.default" for name in LONG]


def test_hooks_of_saved_tensors_may_return_subclasses(way: str) -> None:
    seen = []

    class Seeing(Tensor):
        @classmethod
        def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(op))
            result = op(*(x.plain if isinstance(x, Seeing) else x for x in args), **(kwargs or {}))
            return unpack(result) if op is torch.ops.aten.detach.default else result

    def unpack(x: Tensor) -> Tensor:
        y: Any = Tensor._make_subclass(Seeing, x)
        y.plain = x
        return y

    leaves = _leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), unpack):
        out = _sdpa(*leaves)
    torch.autograd.grad(out.sum(), leaves)
    assert ("flash_attn.backward.default" if way == "function" else f"aten.{EXTENSION}_backward.default") in seen


def test_modes_of_torch_functions_see_the_op_of_flash_attn_func() -> None:
    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    with Recorder():
        _func(*_leaves())
    assert "flash_attn.forward.default" in seen


def test_batched_gradients() -> None:
    leaves = _leaves()
    out, weights = _sdpa(*leaves), torch.randn(4, 2, 3, 5, 8, dtype=torch.float64)
    batched = torch.autograd.grad(out, leaves, weights, retain_graph=True, is_grads_batched=True)
    for i, weight in enumerate(weights):
        for a, b in zip(batched, torch.autograd.grad(out, leaves, weight, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def test_calls_in_a_batched_backward_pass_work() -> None:
    q, k, v = _leaves()

    class Attended(torch.autograd.Function):
        """Its gradient is attention of the gradient that comes in."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
            return _sdpa(dx, k, v)

    out, weights = Attended.apply(q), torch.randn(4, 2, 3, 5, 8, dtype=torch.float64)
    (batched,) = torch.autograd.grad(out, q, weights, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([_sdpa(weight, k, v) for weight in weights]))


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_as_deterministic_as_asked_for_in_the_forward_pass(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    function, forward = plain._apply, extension.forward
    assert forward is not None

    def recorded_function(*args: Any) -> Any:
        given.append(args[-1][1])
        return function(*args)

    def recorded_extension(*args: Any) -> Any:
        given.append(int(-1 - args[4]))
        return forward(*args)

    monkeypatch.setattr(plain, "_apply", recorded_function)
    monkeypatch.setattr(extension, "forward", recorded_extension)
    torch.use_deterministic_algorithms(deterministic)
    try:
        outs = _sdpa(*_leaves()), _func(*_leaves()), _func(*_leaves(), deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for out in outs:
        out.sum().backward()
    q = torch.empty(2, 3, 5, 8)
    found = [arguments.from_plain(q, q, None, number) for number in given]
    assert [options.deterministic for options in found] == [deterministic, deterministic, True]
    assert [options.heads_first for options in found] == [True, False, False]
    assert [options.causal for options in found] == [ops.TOP_LEFT, ops.BOTTOM_RIGHT, ops.BOTTOM_RIGHT]


def test_it_works_where_torch_has_no_way_past_the_search_for_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_dispatch_call_boxed")
    monkeypatch.setattr(extension, "forward", private.past_torch_function(getattr(torch.ops.aten, EXTENSION).default))
    for name, op in (("_forward", plain_forward_op), ("_backward", plain_backward_op)):
        called = private.past_torch_function(op)
        assert called is op
        monkeypatch.setattr(plain, name, called)
    leaves = _leaves()
    got = torch.autograd.grad(_sdpa(*leaves).square().sum(), leaves)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True).square().sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_refusals_are_those_of_the_long_way() -> None:
    q, k, v = _leaves()
    for bad in ((q, k[..., :4], v), (q, k.float(), v), (q, k[:1], v), (q, k, v[:, :2])):
        with pytest.raises(RuntimeError) as short:
            flash_attn.flash_attn_func(*bad)
        with pytest.raises(RuntimeError) as long:
            flash_attn.flash_attn_func(*bad, window_size=(9, 9))
        assert str(short.value) == str(long.value)


def test_without_gradients_no_lse_comes_back() -> None:
    q, k, v = (x.detach() for x in _leaves())
    number = arguments.plain_options(ops.NONE, True, False)
    out, lse = plain_forward_op(q, k, v, None, number)
    again, nothing = plain_forward_op(q, k, v, None, number | arguments.PLAIN_WITHOUT_LSE)
    assert nothing is None and lse.shape == (2, 3, 5) and torch.equal(again, out)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seqlen", [1, 128, 20_000])  # the last needs more room than all calls share
def test_results_without_an_lse_are_the_same(seqlen: int, dtype: torch.dtype, device: str) -> None:
    q, k, v = (torch.randn(1, 8, n, 16, dtype=dtype, device=device) for n in (seqlen, 7, 7))
    with torch.no_grad():
        without = _sdpa(q, k, v)
    assert torch.equal(without, _sdpa(q.requires_grad_(), k, v))


@pytest.mark.gpu
def test_threads_streams_and_graphs_may_share_the_room_of_what_nobody_reads() -> None:
    q, k, v = (torch.randn(2, 4, 300, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    expected = _sdpa(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _sdpa(q, k, v)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(_sdpa(q, k, v))
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in (*outs, captured))


def test_what_the_op_refuses_goes_the_way_that_can_do_more_or_says_why() -> None:
    q, k, v = _leaves()
    assert _sdpa(q, k[:1], v[:1]).shape == q.shape  # broadcasts
    assert _sdpa(q[0], k[0], v[0]).shape == q.shape[1:]
    with pytest.raises(RuntimeError, match="enable_gqa=True"):
        _sdpa(torch.cat([q, q[:, :1]], 1), k[:, :2], v[:, :2])
    with pytest.raises(RuntimeError, match="Expected query, key, and value to have the same dtype"):
        _sdpa(q, k.float(), v)
    with pytest.raises(RuntimeError, match="the same last dimension"):
        _sdpa(q, k[..., :4], v)


def test_running_out_of_memory_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(*_: Any) -> Any:
        calls.append(1)
        raise RuntimeError("out of memory: flash_attn could not allocate out")

    monkeypatch.setattr(plain, "_forward", full)
    monkeypatch.setattr(extension, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        _sdpa(*_leaves())
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_that_changes_nothing_is_no_way_round(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    forward = plain._forward
    monkeypatch.setattr(plain, "_forward", lambda *a: taken.append(a[0].dtype) or forward(*a))
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=dtype) for _ in range(3))
    with torch.autocast("cpu"):
        assert _sdpa(q, k, v).dtype == torch.bfloat16
    assert taken == [torch.bfloat16]
