"""Padded batches to packed sequences and back."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn import bert_padding, flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

LENGTHS = [3, 0, 5, 1]


def _mask(side: str, dtype: torch.dtype) -> Tensor:
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return (mask.flip(-1) if side == "left" else mask).to(dtype)


def test_names_and_order() -> None:
    for function, names in (
        (unpad_input, "hidden_states attention_mask unused_mask"),
        (unpad_input_for_concatenated_sequences, "hidden_states attention_mask_in_length"),
        (pad_input, "hidden_states indices batch seqlen"),
        (index_first_axis, "input indices"),
        (index_put_first_axis, "values indices first_axis_dim"),
        (index_first_axis_residual, "input indices"),
    ):
        assert list(inspect.signature(function).parameters) == names.split()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32], ids=str)
def test_five_results_and_the_way_back(side: str, dtype: torch.dtype) -> None:
    x, mask = torch.randn(4, 5, 2, 3), _mask(side, dtype)
    tokens, indices, starts, longest, used = unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert torch.equal(indices, mask.flatten().nonzero().flatten()) and indices.dtype == torch.int64
    assert starts.tolist() == [0, 3, 3, 8, 9] and used.tolist() == LENGTHS
    assert starts.dtype == used.dtype == torch.int32
    assert type(longest) is int and longest == 5
    assert torch.equal(pad_input(tokens, indices, 4, 5), x * mask.bool()[..., None, None])


def test_tokens_that_are_not_used_keep_their_places() -> None:
    x = torch.randn(2, 4, 3)
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [1, 1, 1, 0]])
    tokens, _, starts, longest, used = unpad_input(x, mask, unused_mask=unused)
    assert torch.equal(tokens, torch.cat((x[0, :3], x[1, :3])))
    assert (starts.tolist(), longest, used.tolist()) == ([0, 3, 6], 3, [2, 1])


def test_several_sequences_in_a_row() -> None:
    x = torch.randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, starts, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(tokens, torch.cat((x[0, :5], x[1, :1], x[2])))
    assert (starts.tolist(), starts.dtype, longest) == ([0, 2, 5, 6, 12], torch.int32, 6)
    assert torch.equal(pad_input(tokens, indices, 3, 6)[0], torch.cat((x[0, :5], torch.zeros(1, 2))))


def test_a_batch_of_nothing() -> None:
    tokens, indices, starts, longest, used = unpad_input(torch.randn(0, 5, 2), torch.ones(0, 5))
    assert tokens.shape == (0, 2) and starts.tolist() == [0] and longest == 0 and used.shape == (0,)
    tokens, indices, starts, longest, _ = unpad_input(torch.randn(2, 5, 2), torch.zeros(2, 5))
    assert tokens.shape == (0, 2) and starts.tolist() == [0, 0, 0] and longest == 0
    assert not pad_input(tokens, indices, 2, 5).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_by_index_and_their_gradients(dtype: torch.dtype) -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    some, twice = torch.tensor([4, 0, 3], dtype=dtype), torch.tensor([1, 1, 5], dtype=dtype)
    assert torch.equal(index_first_axis(x, some), x[some.long()])
    assert torch.equal(index_put_first_axis(x[some.long()], some, 6)[some.long()], x[some.long()])
    (gradient,) = torch.autograd.grad(index_first_axis(x, twice).sum(), x)
    assert gradient[:, 0, 0].tolist() == [0, 2, 0, 0, 0, 1]
    for function in (
        lambda x: index_first_axis(x, twice),
        lambda x: index_put_first_axis(x[:3], some, 8),
        lambda x: pad_input(x[:3], some, 2, 4),
        lambda x: unpad_input(x, torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0], [1, 0], [0, 1]]))[0],
        lambda x: index_first_axis_residual(x, some),
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_indexing_compiles_into_one_graph(dynamic: bool) -> None:
    x, indices = torch.randn(3, 4, requires_grad=True), torch.tensor([5, 0, 3])

    def run(x: Tensor) -> Tensor:
        return index_first_axis(pad_input(x, indices, 2, 3).flatten(0, 1), indices) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(compiled(x), run(x))
    assert torch.equal(*(torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, run)))
    stacked = torch.randn(2, 3, 4)
    expected = torch.stack([run(x) for x in stacked])
    assert torch.equal(torch.vmap(run)(stacked), expected)


def test_attention_of_a_padded_batch() -> None:
    x = torch.randn(4, 5, 2, 8, requires_grad=True)
    tokens, indices, starts, longest, _ = unpad_input(x, _mask("left", torch.bool))
    out = flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, longest, longest, causal=True)
    padded = pad_input(out, indices, 4, 5)
    alone = x[2:3]
    expected = flash_attn_func(alone, alone, alone, causal=True)
    torch.testing.assert_close(padded[2:3], expected)
    got, wanted = (torch.autograd.grad(y.square().sum(), x)[0][2] for y in (padded[2:3], expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "function, arguments, text",
    [
        (unpad_input, (torch.ones(2, 5, 3), torch.ones(2, 4)), r"attention_mask must be .*\(2, 5\).* \(2, 4\)"),
        (unpad_input, (torch.ones(2, 5, 3), torch.ones(2, 1, 5, 5)), r"attention_mask \(batch, seqlen\)"),
        (unpad_input, (torch.ones(2, 5, 3), torch.ones(2, 5), torch.ones(5)), "unused_mask"),
        (unpad_input_for_concatenated_sequences, (torch.ones(2, 5, 3), torch.ones(2, 5)), "integers, but is torch.flo"),
        (pad_input, (torch.ones(3, 2), torch.tensor([0, 1]), 2, 2), r"a row for each of 2 indices.*\(3, 2\)"),
        (index_first_axis, (torch.ones(3, 2), torch.tensor([[0, 1]])), r"indices must be \(n\) int32 or int64"),
        (index_first_axis, (torch.ones(3, 2), torch.tensor([True])), r"indices must be \(n\) int32 or int64"),
    ],
)
def test_what_does_not_fit_is_refused(function: Any, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        function(*arguments)


def test_what_is_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^hidden_states must be a Tensor"):
        unpad_input(None, torch.ones(2, 5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^attention_mask must be a Tensor"):
        unpad_input(torch.ones(2, 5), [[1] * 5] * 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^indices must be a Tensor"):
        index_first_axis(torch.ones(2, 5), [0])  # type: ignore[arg-type]


def test_einops_functions_are_there_where_einops_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "einops", SimpleNamespace(rearrange=1, repeat=2))  # type: ignore[arg-type]
    module: ModuleType = bert_padding
    assert (module.rearrange, module.repeat) == (1, 2)
    monkeypatch.setitem(sys.modules, "einops", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match="einops"):
        exec("from flash_attn.bert_padding import rearrange")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from flash_attn.bert_padding import nothing")
