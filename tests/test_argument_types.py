"""Types of arguments: what is no number, flag or tensor raises a TypeError that names it, in every public function."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.torch_op import attention as ops

STARTS = torch.tensor([0, 3, 5], dtype=torch.int32)


def _sdpa(**changes: Any) -> Tensor:
    x = torch.ones(1, 2, 5, 8)
    return sdpa(x, x, x, **changes)


def _func(**changes: Any) -> Any:
    x = torch.ones(1, 5, 2, 8)
    return flash_attn_func(x, x, x, **changes)


def _varlen(**changes: Any) -> Any:
    x = torch.ones(5, 2, 8)
    lengths = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 3, "max_seqlen_k": 3}
    return flash_attn_varlen_func(x, x, x, **(lengths | changes))


def _attention(**changes: Any) -> Any:
    x = torch.ones(5, 2, 8)
    lengths = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 3, "max_seqlen_k": 3}
    return ops.attention(x, x, x, **(lengths | changes))[0]


NUMBERS: list[tuple[Callable[..., Any], str]] = [
    (_sdpa, "scale"),
    (_sdpa, "dropout_p"),
    *[(f, name) for f in (_func, _varlen, _attention) for name in ("softmax_scale", "softcap", "dropout_p")],
]
INTEGERS = [(_attention, name) for name in ("max_seqlen_q", "max_seqlen_k", "causal", "window_left", "window_right")]
FLAGS: list[tuple[Callable[..., Any], str]] = [
    (_sdpa, "is_causal"),
    (_sdpa, "enable_gqa"),
    (_attention, "heads_first"),
    (_attention, "deterministic"),
    *[(f, name) for f in (_func, _varlen) for name in ("causal", "deterministic", "return_attn_probs", "return_lse")],
]
TENSORS: list[tuple[Callable[..., Any], str]] = [
    (_sdpa, "attn_mask"),
    *[(f, name) for f in (_func, _varlen) for name in ("alibi_slopes", "learnable_sink", "s_aux")],
    *[(_varlen, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")],
]


def _names(cases: list[tuple[Callable[..., Any], str]]) -> list[str]:
    return [f"{function.__name__[1:]}-{name}" for function, name in cases]


@pytest.mark.parametrize("function, name", NUMBERS, ids=_names(NUMBERS))
def test_a_tensor_that_is_differentiated_is_no_number(function: Callable[..., Any], name: str) -> None:
    for value in (nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(1))):
        with pytest.raises(TypeError, match=f"{name} must be a number, but is a Parameter.*{name}.item()"):
            function(**{name: value})
        with torch.no_grad(), pytest.raises(TypeError, match=name):
            function(**{name: value})
    with pytest.raises(TypeError, match=name):
        torch.func.grad(lambda x: function(**{name: x}).sum())(torch.tensor(0.5))
    with pytest.raises(TypeError, match=name):
        torch.func.jvp(lambda x: function(**{name: x}), (torch.tensor(0.5),), (torch.tensor(1.0),))


@pytest.mark.parametrize("function, name", NUMBERS, ids=_names(NUMBERS))
@pytest.mark.parametrize(
    "value", [True, np.bool_(True), "0.5", [0.5], 0.5j, np.ones(1), torch.ones(1), torch.tensor(True)], ids=repr
)
def test_what_is_no_number_raises(function: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number, but is "):
        function(**{name: value})


@pytest.mark.parametrize("function, name", NUMBERS, ids=_names(NUMBERS))
def test_numbers_of_all_kinds_are_taken(function: Callable[..., Any], name: str) -> None:
    for value in (0, np.int32(0), np.float32(0), np.float64(0), torch.tensor(0.0), torch.tensor(0), Fraction(0)):
        torch.testing.assert_close(function(**{name: value}), function(**{name: 0.0}))
    if "scale" in name:
        for value in (1, np.float32(0.5), np.float16(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
            torch.testing.assert_close(function(**{name: value}), function(**{name: float(value)}))
        assert function(**{name: None}) is not None
    else:
        with pytest.raises(TypeError, match=f"{name} must be a number, but is None"):
            function(**{name: None})


@pytest.mark.parametrize("function, name", INTEGERS, ids=_names(INTEGERS))
def test_what_is_no_integer_raises(function: Callable[..., Any], name: str) -> None:
    for value in (3.0, torch.tensor(3), True, "3", np.float32(3)):
        with pytest.raises(TypeError, match=f"{name} must be an int, but is "):
            function(**{name: value})
    function(**{name: np.int64(3 if "max" in name else 1)})


@pytest.mark.parametrize("function, name", FLAGS, ids=_names(FLAGS))
def test_what_is_no_flag_raises(function: Callable[..., Any], name: str) -> None:
    for value in (torch.tensor(True), torch.ones(2), (-1, -1), "yes", 0.0, 2):
        with pytest.raises(TypeError, match=f"{name} must be a bool, but is "):
            function(**{name: value})


def test_a_bool_given_for_dropout_is_refused_and_flags_may_be_numpys_or_ints() -> None:
    x = torch.ones(1, 5, 2, 8)
    with pytest.raises(TypeError, match=r"dropout_p must be a number, but is True \(bool\)"):
        flash_attn_func(x, x, x, True)
    for flag in (np.bool_(True), 1):
        torch.testing.assert_close(_func(causal=flag), _func(causal=True))
        assert len(_func(return_lse=flag)) == 2


@pytest.mark.parametrize("function, name", TENSORS, ids=_names(TENSORS))
def test_what_is_no_tensor_raises(function: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a Tensor, but is .*torch.as_tensor\({name}\)"):
        function(**{name: [0, 3, 5]})
    with pytest.raises(TypeError, match=rf"{name} must be a Tensor, but is 0.5 \(float\)"):
        function(**{name: 0.5})


@pytest.mark.parametrize("function, name", TENSORS, ids=_names(TENSORS))
def test_sparse_tensors_are_refused(function: Callable[..., Any], name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"{name} must be strided, but its layout is .*{name}.to_dense"):
        function(**{name: torch.ones(2).to_sparse()})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_inputs_that_are_no_tensors_raise(name: str) -> None:
    x = torch.ones(1, 5, 2, 8)
    for value in (None, x.numpy(), x.tolist()):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor"):
            flash_attn_func(**({"q": x, "k": x, "v": x} | {name: value}))
    with pytest.raises(NotImplementedError, match=f"{name} must be strided"):
        flash_attn_func(**({"q": x, "k": x, "v": x} | {name: x.to_sparse()}))


@pytest.mark.parametrize(
    "value", [5.0, "5", torch.tensor(5.0), torch.tensor([3, 3]), True, torch.tensor(True)], ids=repr
)
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_lengths_that_are_no_integers_raise(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        _varlen(**{name: value})


@pytest.mark.parametrize(
    "window", [3, None, "ab", (1,), (1, 2, 3), (3.5, 0), (True, 0), ("1", 0), torch.tensor([1.0, 2.0])], ids=repr
)
@pytest.mark.parametrize("function", [_func, _varlen])
def test_windows_that_are_not_two_integers_raise(function: Callable[..., Any], window: Any) -> None:
    with pytest.raises(ValueError, match="window_size must be two integers"):
        function(window_size=window)


@pytest.mark.parametrize(
    "window, same",
    [
        ([2, 1], (2, 1)),
        (torch.tensor([2, 1]), (2, 1)),
        (np.array([2, 1]), (2, 1)),
        ((torch.tensor(2), np.int32(1)), (2, 1)),
        ((None, None), (-1, -1)),
        ((2, None), (2, -1)),
        ((-7, 0), (-1, 0)),
        ((2, -(2**40)), (2, -1)),
        ((2**40, 1), (-1, 1)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("causal", [False, True])
def test_windows_in_every_form(window: Any, same: tuple[int, int], causal: bool) -> None:
    q = torch.randn(1, 9, 2, 8)
    expected = flash_attn_func(q, q, q, causal=causal, window_size=same)
    assert torch.equal(flash_attn_func(q, q, q, causal=causal, window_size=window), expected)


def test_symbolic_numbers_compile_in_one_graph() -> None:
    def attend(q: Tensor, k: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        scale, longest = factor / q.shape[-1], k.shape[1]
        return (
            sdpa(*(x.transpose(1, 2) for x in (q, k, k)), scale=scale, dropout_p=0),
            flash_attn_func(q, k, k, softmax_scale=scale, softcap=factor, window_size=(longest, q.shape[1])),
        )

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length, factor in ((5, 1.5), (6, 2.5), (9, 3.5)):
        q, k = torch.randn(2, length, 3, 8), torch.randn(2, length + 2, 3, 8)
        torch.testing.assert_close(compiled(q, k, factor), attend(q, k, factor))


def test_numbers_of_numpy_compile_in_one_graph() -> None:
    def attend(q: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
        heads = q.transpose(0, 1)[None]
        return (
            sdpa(heads, heads, heads, scale=np.float64(0.25)),
            sdpa(heads, heads, heads, scale=1 / np.sqrt(heads.shape[-1])),
            flash_attn_func(q[None], q[None], q[None], softcap=np.float64(2.0), window_size=(np.int64(1), None)),
            flash_attn_varlen_func(q, q, q, starts, starts, np.int64(3), np.int32(3)),
        )

    torch._dynamo.reset()
    q = torch.randn(5, 3, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, STARTS), attend(q, STARTS))


def test_compiled_code_refuses_a_scale_that_is_differentiated() -> None:
    scale = nn.Parameter(torch.tensor(0.5))
    q = torch.ones(1, 2, 5, 8)
    torch._dynamo.reset()
    with pytest.raises(TypeError, match="scale must be a number"):
        torch.compile(lambda q: sdpa(q, q, q, scale=scale), backend="eager")(q)
    with pytest.raises(TypeError):
        F.scaled_dot_product_attention(q, q, q, scale=scale)  # as torch's function
