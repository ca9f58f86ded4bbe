"""Compiled, replaced, subclassed: ways into `scaled_dot_product_attention` other than a plain call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

import flash_attn
from flash_attn import replace_sdpa
from flash_attn import scaled_dot_product_attention as sdpa
from introspection import needs_introspection

TORCHS = F.scaled_dot_product_attention


def _jagged(lengths: list[int]) -> Tensor:
    parts = [torch.randn(n, 2, 8, dtype=torch.float64) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("heads_k, heads_v", [(3, 3), (1, 3)])
def test_compiles_in_one_graph_for_all_lengths(
    lead: tuple[int, ...], heads_k: int, heads_v: int, dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    grouped = len(lead) > 0 and heads_k != heads_v
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sdpa, fullgraph=True, dynamic=dynamic, backend=counter)
    for length in (5, 6, 9, 12):
        q = torch.randn(*lead, length, 8, dtype=torch.float64, requires_grad=True)
        k = torch.randn(*lead[:-1], *((heads_k,) if lead else ()), length + 2, 8, dtype=torch.float64)
        v = torch.randn(*lead[:-1], *((heads_v,) if lead else ()), length + 2, 8, dtype=torch.float64)
        results = [f(q, k, v, is_causal=True, enable_gqa=grouped) for f in (compiled, sdpa)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), q) for x in results))
    assert counter.frame_count <= 2


def test_a_replaced_function_compiles_in_one_graph() -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def attend_by_math(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(x)

    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(module.graph))
        return module.forward

    torch._dynamo.reset()
    x = torch.randn(2, 3, 5, 8)
    expected = attend(x)
    with replace_sdpa():
        for function in (attend, attend_by_math):
            torch.testing.assert_close(torch.compile(function, fullgraph=True, backend=backend)(x), expected)
    assert ["flash_attn" in graph for graph in graphs] == [True, False]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("heads", [2, 3])
def test_a_causal_bias_keeps_its_meaning_in_a_replaced_function(backend: SDPBackend, heads: int) -> None:
    q, k = torch.randn(2, heads, 4, 8), torch.randn(2, heads, 9, 8)
    expected = TORCHS(q, k, k, torch.ones(4, 9, dtype=torch.bool).tril(5))
    with replace_sdpa(), sdpa_kernel(backend):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, causal_lower_right(4, 9)), expected)
        with pytest.raises(ValueError, match="is_causal"):
            F.scaled_dot_product_attention(q, k, k, causal_lower_right(4, 9), is_causal=True)


def test_a_top_left_bias_fits_any_lengths_as_in_torch() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 9, 8)
    for bias in (causal_upper_left(20, 30), causal_lower_right(20, 20)):
        torch.testing.assert_close(sdpa(q, k, k, bias), TORCHS(q, k, k, bias))
    with pytest.raises(RuntimeError, match="CausalBias"):
        sdpa(q, k, k, causal_lower_right(3, 9))


def test_modes_see_the_function_that_was_called_and_come_first() -> None:
    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen: list[Any] = []
    q = torch.randn(2, 3, 5, 8)
    with Recorder():
        sdpa(q, q, q, causal_lower_right(5, 5))
    assert seen == [sdpa]
    seen.clear()
    with replace_sdpa():
        with Recorder():
            F.scaled_dot_product_attention(q, q, q)
        assert seen == [F.scaled_dot_product_attention]


def test_jagged_tensors_compile_and_are_checked() -> None:
    def attend(x: Tensor) -> Tensor:
        return sdpa(*(x.transpose(1, 2),) * 3, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 5], [4, 9, 2]):
        x = _jagged(lengths)
        results = [f(x) for f in (compiled, attend)]
        torch.testing.assert_close(*(y.values() for y in results))
        torch.testing.assert_close(*(torch.autograd.grad(y.values().sum(), x)[0].values() for y in results))
    q = _jagged([3, 5]).transpose(1, 2)
    with pytest.raises(RuntimeError, match="enable_gqa"):
        sdpa(
            q,
            *(torch.nested.nested_tensor_from_jagged(torch.randn(8, 3, 8).double(), q.offsets()).transpose(1, 2),) * 2,
        )
    with pytest.raises(ValueError, match="nested"):
        sdpa(torch.randn(2, 2, 5, 8), q, q)


@pytest.mark.parametrize("who", ["query", "key", "both"])
def test_jagged_tensors_with_holes(who: str) -> None:
    starts, lengths = torch.tensor([2, 1, 4]), torch.tensor([3, 0, 5])

    def narrowed(x: Tensor, holes: bool) -> tuple[Tensor, list[Tensor]]:
        parts = [y[s : s + n] for y, s, n in zip(x, starts.tolist(), lengths.tolist(), strict=True)]
        if holes:
            return torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged).transpose(1, 2), parts
        return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2), parts

    q, qs = narrowed(torch.randn(3, 9, 2, 8, dtype=torch.float64), who != "key")
    k, ks = narrowed(torch.randn(3, 9, 2, 8, dtype=torch.float64), who != "query")
    for causal in (False, True):
        out = sdpa(q, k, k, is_causal=causal)
        for got, a, b in zip(out.unbind(), qs, ks, strict=True):
            expected = sdpa(a.transpose(0, 1), *(b.transpose(0, 1),) * 2, is_causal=causal)
            torch.testing.assert_close(got, expected)


def test_jagged_keys_and_values_must_have_the_same_lengths() -> None:
    x, same, other = (_jagged(lengths).transpose(1, 2) for lengths in ([3, 5], [3, 5], [5, 3]))
    for got, a, b in zip(sdpa(x, x, same).unbind(), x.unbind(), same.unbind(), strict=True):
        torch.testing.assert_close(got, sdpa(a, a, b))
    with pytest.raises(RuntimeError, match="key and value must have the same offsets"):
        sdpa(x, x, other)
    with pytest.raises(
        RuntimeError, match=r"heads of key and value must divide those of query, but query has 2 and key 3"
    ):
        wide = torch.nested.nested_tensor_from_jagged(torch.randn(8, 3, 8).double(), x.offsets()).transpose(1, 2)
        sdpa(x, wide, wide, enable_gqa=True)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 3, 1, 2, 4), (3, 2, 1, 0, 4)], ids=str)
def test_output_lies_in_memory_as_query(order: tuple[int, ...]) -> None:
    sizes = (2, 5, 3, 4, 8)
    q = torch.randn([sizes[i] for i in order]).permute([order.index(i) for i in range(5)])
    out = sdpa(q, q, q)
    assert out.shape == q.shape and out.stride() == q.stride()
    torch.testing.assert_close(out, TORCHS(q, q, q))


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((1, 2, 3, 8), (2, 2, 0, 8), (2, 2, 0, 4)),
        ((1, 2, 0, 8), (2, 2, 4, 8), (2, 2, 4, 3)),
        ((1, 3, 4, 8), (0, 3, 4, 8), (0, 3, 4, 8)),
        ((0, 1, 5, 8), (1, 4, 5, 8), (1, 4, 5, 8)),
        ((4, 6, 5, 8), (4, 0, 5, 8), (4, 0, 5, 8)),
    ],
    ids=str,
)
def test_empty_results_have_torchs_shape(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    inputs = [torch.randn(shape, requires_grad=True) for shape in (q, k, v)]
    try:
        expected = TORCHS(*inputs)
    except RuntimeError:  # torch 2.11 broadcasts here too
        with pytest.raises(RuntimeError, match="must broadcast"):
            sdpa(*inputs)
        return
    out = sdpa(*inputs)
    torch.testing.assert_close(out, expected)
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    "changes",
    [{"key": None}, {"attn_mask": [1.0]}, {"enable_gqa": 1}, {"is_causal": 1}, {"scale": "1"}, {"dropout_p": None}],
    ids=str,
)
def test_arguments_of_other_types_raise_type_errors(changes: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 5, 8)
    for function in (sdpa, TORCHS):
        with pytest.raises(TypeError):
            function(**({"query": x, "key": x, "value": x} | changes))


def test_tensors_on_meta_do_not_mix_with_others() -> None:
    x, meta = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8, device="meta")
    assert sdpa(meta, meta, meta).is_meta
    with pytest.raises(RuntimeError, match="same device"):
        sdpa(x, meta, x)
    with pytest.raises(RuntimeError, match="device"):
        sdpa(x, x, x, torch.zeros(5, 5, device="meta"))


@needs_introspection
def test_replacements_can_be_entered_again() -> None:
    replacement = replace_sdpa()
    replacement.restore()
    replacement.restore()
    assert F.scaled_dot_product_attention is TORCHS
    with replacement:
        assert F.scaled_dot_product_attention is not TORCHS
        assert flash_attn.explain(lambda: F.scaled_dot_product_attention(*(torch.randn(1, 1, 2, 8),) * 3)).calls
    assert F.scaled_dot_product_attention is TORCHS
