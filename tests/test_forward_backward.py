"""`_flash_attn_forward`, `_flash_attn_backward` and their siblings: the single steps that others derive themselves."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn import flash_attn_interface as interface
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
)
from flash_attn.torch_op import attention as ops

STARTS_Q = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
STARTS_K = torch.tensor([0, 5, 6, 13], dtype=torch.int32)

_MASK = ["causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes"]
_LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
_GRADIENTS = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
_CACHE = {"block_table": None, "leftpad_k": None, "seqused_k": None, "zero_tensors": False, "num_splits": 0}
_DEFAULTS = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
SIGNATURES: dict[str, tuple[list[str], dict[str, object]]] = {
    "forward": (["q", "k", "v", "dropout_p", "softmax_scale", *_MASK, "return_softmax"], {}),
    "varlen_forward": (
        ["q", "k", "v", *_LENGTHS, "dropout_p", "softmax_scale", *_MASK, "return_softmax", *_CACHE],
        _DEFAULTS | {"return_softmax": False} | _CACHE,
    ),
    "backward": (
        [*_GRADIENTS, "dropout_p", "softmax_scale", *_MASK, "deterministic", "rng_state"],
        {"rng_state": None},
    ),
    "varlen_backward": (
        [*_GRADIENTS, *_LENGTHS, "dropout_p", "softmax_scale", *_MASK, "deterministic", "rng_state", "zero_tensors"],
        {"rng_state": None, "zero_tensors": False},
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults(name: str) -> None:
    function = getattr(interface, f"_flash_attn_{name}")
    assert getattr(interface, f"_wrapped_flash_attn_{name}") is function
    parameters = inspect.signature(function).parameters.values()
    names, defaults = SIGNATURES[name]
    assert [x.name for x in parameters] == names
    assert {x.name: x.default for x in parameters if x.default is not x.empty} == defaults


def _assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_both_steps_are_those_of_flash_attn_func() -> None:
    q, k, v = (torch.randn(2, n, h, 8, requires_grad=True) for n, h in ((7, 4), (9, 2), (9, 2)))
    slopes = torch.rand(4)
    options = {"softmax_scale": 0.3, "causal": True, "softcap": 2.0, "alibi_slopes": slopes, "deterministic": True}
    expected, expected_lse = flash_attn_func(q, k, v, window_size=(5, 0), return_lse=True, **options)
    with torch.no_grad():
        out, lse, probabilities, rng_state = _flash_attn_forward(q, k, v, 0.0, 0.3, True, 5, 0, 2.0, slopes, False)
    _assert_equal([out, lse], [expected.detach(), expected_lse.detach()])
    assert probabilities.numel() == 0
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64

    dout = torch.randn_like(out)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    arguments = (dout, q, k, v, out, lse, dq, dk, dv, 0.0, 0.3, True, 5, 0, 2.0, slopes, True)
    with torch.no_grad():
        row_sums = _flash_attn_backward(*arguments, rng_state=rng_state)
    _assert_equal([dq, dk, dv], list(torch.autograd.grad(expected, (q, k, v), dout)))
    torch.testing.assert_close(row_sums, (dout * out).sum(-1).transpose(1, 2))
    assert row_sums.shape == lse.shape and row_sums.is_contiguous()


@pytest.mark.parametrize("seqused", [None, torch.tensor([5, 0, 4], dtype=torch.int32)], ids=["all", "some"])
def test_both_steps_are_those_of_flash_attn_varlen_func(seqused: Tensor | None) -> None:
    q, k, v = (torch.randn(n, h, 8, requires_grad=True) for n, h in ((10, 4), (13, 2), (13, 2)))
    expected, expected_lse = flash_attn_varlen_func(
        q, k, v, STARTS_Q, STARTS_K, 7, 7, causal=True, return_lse=True, seqused_k=seqused
    )
    lengths = (STARTS_Q, STARTS_K, torch.tensor(7), 7)
    with torch.no_grad():
        out, lse, _, rng_state = _flash_attn_varlen_forward(
            q, k, v, *lengths, 0.0, None, causal=True, seqused_k=seqused, zero_tensors=True, num_splits=3
        )
    _assert_equal([out, lse], [expected.detach(), expected_lse.detach()])
    if seqused is not None:
        return  # backward of theirs does not take it
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    dout = torch.randn_like(out)
    tail = (0.0, None, True, -1, -1, 0.0, None, False)
    with torch.no_grad():
        row_sums = _flash_attn_varlen_backward(dout, q, k, v, out, lse, *gradients, *lengths, *tail, rng_state, True)
    _assert_equal(gradients, list(torch.autograd.grad(expected, (q, k, v), dout)))
    torch.testing.assert_close(row_sums, (dout * out).sum(-1).T)


@pytest.mark.parametrize("varlen", [False, True])
def test_dropouts_state_repeats_the_mask(varlen: bool) -> None:
    q, k, v = (torch.randn(1, 13, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, 13], dtype=torch.int32)
    lengths = (starts, starts, 13, 13) if varlen else ()
    forward = _flash_attn_varlen_forward if varlen else _flash_attn_forward
    backward = _flash_attn_varlen_backward if varlen else _flash_attn_backward
    parts = [x.detach()[0] if varlen else x.detach() for x in (q, k, v)]
    tail = (0.4, 0.3, False, -1, -1, 0.0, None)

    torch.manual_seed(5)
    expected = flash_attn_func(q, k, v, 0.4, 0.3)
    torch.manual_seed(5)
    out, lse, _, rng_state = forward(*parts, *lengths, *tail, False)
    _assert_equal(out, expected.detach()[0] if varlen else expected.detach())
    torch.manual_seed(6)  # backward draws nothing
    dout = torch.randn_like(out)
    gradients = [torch.empty_like(x) for x in parts]
    backward(dout, *parts, out, lse, *gradients, *lengths, *tail, True, rng_state)
    wanted = torch.autograd.grad(expected, (q, k, v), dout.view_as(expected))
    _assert_equal(gradients, [x[0] if varlen else x for x in wanted])
    with pytest.raises(RuntimeError, match="rng_state must be given when dropout_p > 0"):
        backward(dout, *parts, out, lse, *gradients, *lengths, *tail, True)


def test_gradients_go_into_views_and_those_that_are_none_are_left_out() -> None:
    qkv = torch.randn(2, 7, 3, 4, 8)
    q, k, v = qkv.unbind(2)
    out, lse, _, _ = _flash_attn_forward(q, k, v, 0.0, None, False, -1, -1, 0.0, None, False)
    dout, tail = torch.randn_like(out), (0.0, None, False, -1, -1, 0.0, None, False)
    expected = [torch.empty_like(q) for _ in range(3)]
    _flash_attn_backward(dout, q, k, v, out, lse, *expected, *tail)
    dqkv = torch.zeros_like(qkv)
    strided_lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    _flash_attn_backward(dout, q, k, v, out, strided_lse, dqkv[:, :, 0], None, dqkv[:, :, 2], *tail)
    _assert_equal(dqkv, torch.stack((expected[0], torch.zeros_like(q), expected[2]), 2))


def test_keys_may_be_spread_over_several_calls() -> None:
    """Ring attention: partial results merge by lse, and each call's backward takes the whole's out and lse."""
    q, k, v = (torch.randn(2, n, 4, 8, dtype=torch.float64) for n in (7, 12, 12))
    tail: tuple[Any, ...] = (0.0, 0.3, False, -1, -1, 0.0, None)
    parts = [_flash_attn_forward(q, *kv, *tail, False)[:2] for kv in zip(k.split(5, 1), v.split(5, 1), strict=True)]
    lse = torch.stack([part for _, part in parts]).logsumexp(0)
    out = sum(part * (own - lse).exp().mT.unsqueeze(-1) for part, own in parts)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = flash_attn_func(*whole, softmax_scale=0.3)
    torch.testing.assert_close(out, expected.detach())
    dout = torch.randn_like(q)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for part in zip(k.split(5, 1), v.split(5, 1), dk.split(5, 1), dv.split(5, 1), strict=True):
        dq_part = torch.empty_like(q)
        _flash_attn_backward(dout, q, *part[:2], out, lse, dq_part, *part[2:], *tail, False)
        dq += dq_part
    torch.testing.assert_close([dq, dk, dv], list(torch.autograd.grad(expected, whole, dout)))


def test_lengths_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(ops, "_CHECK_LENGTHS", True)
    monkeypatch.setattr(ops, "_check_lengths", lambda tensors, options: checked.append(tensors.cu_seqlens_k))
    q, tail = torch.randn(10, 4, 8), (0.0, None, False, -1, -1, 0.0, None, False)
    out, lse, _, _ = _flash_attn_varlen_forward(q, q, q, STARTS_Q, STARTS_Q, 7, 7, *tail)
    gradients = [torch.empty_like(q) for _ in range(3)]
    _flash_attn_varlen_backward(q, q, q, q, out, lse, *gradients, STARTS_Q, STARTS_Q, 7, 7, *tail)
    assert len(checked) == 2 and all(x is STARTS_Q for x in checked)


class _Theirs(torch.autograd.Function):
    """As diffusers and ring attention wrap both steps: all arguments by position."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout_p: float) -> Tensor:
        ctx.options = (dropout_p, q.shape[-1] ** -0.5, causal, -1, -1, 0.0, None)
        out, lse, _, rng_state = _wrapped_flash_attn_forward(q, k, v, *ctx.options, True)
        ctx.save_for_backward(q, k, v, out, lse, rng_state)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, lse, rng_state = ctx.saved_tensors
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _wrapped_flash_attn_backward(dout, q, k, v, out, lse, *gradients, *ctx.options, False, rng_state)
        return *gradients, None, None


@pytest.mark.gpu
@pytest.mark.parametrize("inference", [False, True])
def test_running_out_of_memory_is_torchs_error(inference: bool) -> None:
    q = torch.zeros(1, 1, 1, 8, device="cuda").expand(1 << 20, 1 << 14, 4, 8)
    with torch.inference_mode(inference), pytest.raises(torch.OutOfMemoryError, match="MiB for out"):
        _flash_attn_forward(q, q[:, :1], q[:, :1], 0.0, None, False, -1, -1, 0.0, None, False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_function_around_both_trains(dtype: torch.dtype, compiled: bool) -> None:
    def run(*qkv: Tensor) -> Tensor:
        return _Theirs.apply(*qkv, True, 0.0)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    qkv = [torch.randn(2, 7, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    results = []
    for out in (run(*qkv), flash_attn_func(*qkv, causal=True)):
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), qkv)])
    _assert_equal(*results)


def test_both_steps_compile_for_any_length_with_dropout() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        tail: tuple[Any, ...] = (0.3, None, True, -1, -1, 0.0, None, False)
        out, lse, _, rng_state = _flash_attn_forward(q, k, v, *tail)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        row_sums = _flash_attn_backward(out, q, k, v, out, lse, *gradients, *tail, rng_state)
        return [out, row_sums, *gradients]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        qkv = [torch.randn(2, rows, 3, 8) for _ in range(3)]
        torch.manual_seed(0)
        expected = run(*qkv)
        torch.manual_seed(0)
        _assert_equal(compiled(*qkv), expected)


def test_its_own_derivatives() -> None:
    q = torch.randn(2, 7, 4, 8, requires_grad=True)
    tail: tuple[Any, ...] = (0.0, None, False, -1, -1, 0.0, None)
    out, lse, _, _ = _flash_attn_forward(q, q, q, *tail, False)
    _assert_equal(torch.autograd.grad(out.sum(), q), torch.autograd.grad(flash_attn_func(q, q, q).sum(), q))
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    _flash_attn_backward(torch.ones_like(q), q, q, q, out, lse, dq, dk, dv, *tail, False)
    expected = torch.autograd.grad(flash_attn_func(q, q, q).sum(), q, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad((dq + dk + dv).sum(), q), torch.autograd.grad(expected[0].sum(), q))


def test_refusals_name_the_argument_and_write_nothing() -> None:
    q = torch.randn(2, 7, 4, 8)
    tail: tuple[Any, ...] = (0.0, None, False, -1, -1, 0.0, None)
    out, lse, _, _ = _flash_attn_forward(q, q, q, *tail, False)
    dq, dk, dv = (torch.full_like(q, torch.nan) for _ in range(3))
    for error, text, arguments in (
        (RuntimeError, r"dk must be as k, torch.float32 \(2, 7, 4, 8\)", (q, q, q, q, out, lse, dq, dk[:1], dv, *tail)),
        (RuntimeError, "dv must be as v.*torch.float64", (q, q, q, q, out, lse, dq, dk, dv.double(), *tail)),
        (RuntimeError, "softmax_lse must have shape", (q, q, q, q, out, lse[..., :5], dq, dk, dv, *tail)),
        (TypeError, "softmax_lse must be a Tensor", (q, q, q, q, out, None, dq, dk, dv, *tail)),
        (TypeError, "dq must be a Tensor", (q, q, q, q, out, lse, [dq], dk, dv, *tail)),
    ):
        with pytest.raises(error, match=text):
            _flash_attn_backward(*arguments, False)
        assert dq.isnan().all() and dk.isnan().all() and dv.isnan().all()
    with pytest.raises(TypeError, match="window_size_left must be an int"):
        _flash_attn_forward(q, q, q, 0.0, None, False, 1.5, -1, 0.0, None, False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="causal must be a bool"):
        _flash_attn_forward(q, q, q, 0.0, None, None, -1, -1, 0.0, None, False)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"q must be .*batch, seqlen, heads, head_dim"):
        _flash_attn_forward(q[0], q, q, *tail, False)
    packed = (q.flatten(0, 1),) * 3
    starts = torch.tensor([0, 14], dtype=torch.int32)
    for name in ("block_table", "leftpad_k"):
        with pytest.raises(NotImplementedError, match=f"{name} must be None"):
            _flash_attn_varlen_forward(*packed, starts, starts, 14, 14, 0.0, None, False, **{name: starts})
