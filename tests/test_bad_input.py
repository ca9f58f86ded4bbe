"""Every refusal of the op: an exception, raised before anything runs, that names the argument, what came and what is
accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn.torch_op import attention as ops
from introspection import needs_introspection

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _qkv(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shape = shape or (2, 5, 4, 8)
    return {name: torch.randn(shape).to(dtype) for name in "qkv"}


def _packed(**changes: Any) -> dict[str, Any]:
    starts = torch.tensor([0, 3, 9], dtype=torch.int32)
    arguments = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 6, "max_seqlen_k": 6}
    return _qkv(9, 4, 8) | arguments | changes


INT32 = torch.int32

REFUSALS: list[tuple[str, dict[str, Any]]] = [
    (r"q must be \(batch, seqlen, heads, head_dim\).*\(5, 4, 8\)", {"q": torch.randn(5, 4, 8)}),
    (r"k must be \(batch, seqlen, heads, head_dim\)", {"k": torch.randn(2, 5, 4)}),
    ("q must be float64, float32, bfloat16 or float16", _qkv(dtype=torch.int32)),
    ("same dtype.*float32, float16 and float32", {"k": torch.randn(2, 5, 4, 8).half()}),
    ("same batch, seqlen and heads", {"v": torch.randn(2, 6, 4, 8)}),
    ("same batch, seqlen and heads", {"v": torch.randn(2, 5, 2, 8)}),
    ("same batch, but q has 3 and k 2", {"q": torch.randn(3, 5, 4, 8)}),
    ("same head_dim", {"q": torch.randn(2, 5, 4, 9)}),
    ("must divide those of q, but q has 5 and k 4", {"q": torch.randn(2, 5, 5, 8)}),
    (r"attn_mask must broadcast.*\(2, 4, 5, 5\).*\(2, 4, 5, 6\)", {"attn_mask": torch.randn(2, 4, 5, 6)}),
    ("attn_mask must broadcast", {"attn_mask": torch.randn(5, 5)}),
    ("attn_mask must be bool, float32 or q's dtype", {"attn_mask": torch.zeros(1, 1, 5, 5, dtype=INT32)}),
    ("attn_mask must be bool, float32 or q's dtype", {"attn_mask": torch.zeros(1, 1, 5, 5).half()}),
    ("alibi_slopes must be float32, but is float64", {"alibi_slopes": torch.zeros(4, dtype=torch.float64)}),
    (r"alibi_slopes must have shape \(num_heads\) = \(4,\)", {"alibi_slopes": torch.zeros(3)}),
    ("sinks must be float32", {"sinks": torch.zeros(4, dtype=torch.bfloat16)}),
    ("sinks must have shape", {"sinks": torch.zeros(2, 4)}),
    ("window must be two numbers >= 0, or -1", {"window_left": -2}),
    ("window must be two numbers >= 0, or -1", {"window_right": -3}),
    ("causal must be 0", {"causal": 3}),
    ("softcap must be 0 .off. or a positive number", {"softcap": -1.0}),
    ("softcap must be 0 .off. or a positive number", {"softcap": float("nan")}),
    (r"dropout_p must be in \[0, 1\], but is 1.5", {"dropout_p": 1.5, "rng_state": torch.tensor([1, 2])}),
    (r"dropout_p must be in \[0, 1\]", {"dropout_p": -0.5}),
    (r"dropout_p must be in \[0, 1\]", {"dropout_p": float("nan")}),
    ("rng_state must be int64", {"dropout_p": 0.5, "rng_state": torch.tensor([1.0, 2.0])}),
    ("rng_state must have shape", {"dropout_p": 0.5, "rng_state": torch.tensor([1])}),
    ("seqused_k must be int32, but is int64", {"seqused_k": torch.tensor([1, 2])}),
    (r"seqused_q must have shape \(batch\) = \(2,\)", {"seqused_q": torch.tensor([1], dtype=INT32)}),
    ("cu_seqlens_q must be int32, but is int64", _packed(cu_seqlens_q=torch.tensor([0, 3, 9]))),
    ("cu_seqlens_k must have shape", _packed(cu_seqlens_k=torch.tensor([0, 9], dtype=INT32))),
    ("max_seqlen_q must be given", _packed(max_seqlen_q=None)),
    ("cu_seqlens_k must be given with max_seqlen_k", _packed(cu_seqlens_k=None)),
    ("max_seqlen_k must be >= 0", _packed(max_seqlen_k=-1)),
    (r"q must be \(total, heads, head_dim\) with cu_seqlens", _packed(q=torch.randn(1, 9, 4, 8))),
]

HOST_LENGTHS: list[tuple[str, dict[str, Any]]] = [
    ("cu_seqlens_q must not decrease", _packed(cu_seqlens_q=torch.tensor([0, 6, 3], dtype=INT32))),
    ("cu_seqlens_q must start with 0, but starts with 3", _packed(cu_seqlens_q=torch.tensor([3, 6, 9], dtype=INT32))),
    ("cu_seqlens_k must start with 0, but starts with -1", _packed(cu_seqlens_k=torch.tensor([-1, 6, 9], dtype=INT32))),
    ("cu_seqlens_k must not decrease", _packed(cu_seqlens_k=torch.tensor([0, 3, 10], dtype=INT32))),
    ("max_seqlen_q must be at least the longest sequence, but is 5 and sequence 1 has 6", _packed(max_seqlen_q=5)),
    ("seqused_k must lie in", {"seqused_k": torch.tensor([5, 6], dtype=INT32)}),
    ("seqused_q must lie in", _packed(seqused_q=torch.tensor([-1, 2], dtype=INT32))),
]


def _on(device: str, changes: dict[str, Any]) -> dict[str, Any]:
    arguments = _qkv() | changes
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def _call(device: str, changes: dict[str, Any]) -> None:
    ops.attention(**_on(device, changes))


def _cuda_allocations() -> int:
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0) if torch.cuda.is_available() else 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text, changes", REFUSALS, ids=[str(i) + " " + t[:30] for i, (t, _) in enumerate(REFUSALS)])
def test_a_wrong_argument_is_refused(text: str, changes: dict[str, Any], device: str) -> None:
    arguments = _on(device, changes)
    before = _cuda_allocations()
    with pytest.raises(RuntimeError, match=text):
        ops.attention(**arguments)
    assert _cuda_allocations() == before  # no result was made, so nothing was launched either


def _refusal(arguments: dict[str, Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(RuntimeError) as raised:
        ops.attention(**arguments)
    return raised.type, str(raised.value)


@needs_introspection
@pytest.mark.parametrize(
    "text, changes", [*REFUSALS, ("at most 4 dimensions", {"attn_mask": torch.zeros(1, 1, 1, 5, 5)})]
)
def test_tensors_without_data_are_refused_in_the_same_words(text: str, changes: dict[str, Any]) -> None:
    refused = _refusal(_on("cpu", changes))
    assert _refusal(_on("meta", changes)) == refused
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in (_qkv() | changes).items()}
        assert _refusal(fake) == refused


@needs_introspection
@pytest.mark.parametrize("name", ["k", "v", "attn_mask", "alibi_slopes", "seqused_k"])
def test_tensors_without_data_do_not_mix_with_others(name: str) -> None:
    optional = {"attn_mask": torch.zeros(1, 1, 5, 5), "alibi_slopes": torch.zeros(4), "seqused_k": torch.zeros(2).int()}
    arguments = _on("meta", optional)
    arguments[name] = torch.zeros_like(arguments[name], device="cpu")
    with pytest.raises(RuntimeError, match=f"{name} must be on q's device meta, but is on cpu"):
        ops.attention(**arguments)


def test_compiled_code_with_symbolic_sizes_refuses_when_it_is_traced() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: ops.attention(**x)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(**_qkv())
    for text, changes in REFUSALS[5:9]:
        with pytest.raises(Exception, match=text):
            compiled(**(_qkv() | changes))


@pytest.mark.parametrize("text, changes", HOST_LENGTHS)
def test_lengths_in_host_memory_are_checked_in_full(text: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=text):
        _call("cpu", changes)


@pytest.mark.gpu
@pytest.mark.parametrize("text, changes", HOST_LENGTHS)
def test_lengths_on_a_device_are_checked_on_request_and_clamped_otherwise(
    text: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _call("cuda", changes)
    torch.cuda.synchronize()
    monkeypatch.setattr(ops, "_CHECK_LENGTHS", True)
    with pytest.raises(RuntimeError):
        _call("cuda", changes)


@pytest.mark.parametrize("side", ["q", "k"])
def test_starts_without_their_leading_zero_are_refused_on_request(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_CHECK_LENGTHS", True)
    starts = torch.tensor([3, 6, 9], dtype=INT32)
    with pytest.raises(RuntimeError, match=rf"cu_seqlens_{side} must start with 0.*\[3, 6, 9\]"):
        _call("cpu", _packed(**{f"cu_seqlens_{side}": starts}))


@pytest.mark.parametrize("rate", [-0.5, 1.5, 2, float("nan"), float("inf")])
def test_a_refused_rate_draws_nothing(rate: float) -> None:
    inputs, before = _qkv(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"dropout_p must be in \[0, 1\]"):
        ops.attention(**inputs, dropout_p=rate)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unsupported_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_CPU", "mmx")
    with pytest.raises(RuntimeError, match=r"FLASH_ATTN_CPU must name an instruction set of this processor.*mmx"):
        ops.attention(**_qkv())


@pytest.mark.parametrize("device", ["cpu", pytest.param("meta", marks=needs_introspection)])
def test_gradients_of_what_has_none_are_refused(device: str) -> None:
    inputs = _on(device, {})
    out, lse = ops.attention(**inputs)
    options: dict[str, Any] = {
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
        "softmax_scale": None,
        "causal": 0,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "heads_first": False,
        "deterministic": False,
    }

    def backward(
        mask: Any = None, out: torch.Tensor = out, needs: tuple[bool, ...] = (True,) * 3 + (False,) * 3
    ) -> None:
        tensors = (*inputs.values(), mask, *(None,) * 8)
        torch.ops.flash_attn.backward(torch.ones_like(out), None, *tensors, out, lse, needs=list(needs), **options)

    backward()
    only_mask = (False, False, False, True, False, False)
    with pytest.raises(RuntimeError, match="attn_mask must be a floating-point tensor"):
        backward(torch.ones(1, 1, 5, 5, dtype=torch.bool, device=device), needs=only_mask)
    with pytest.raises(RuntimeError, match="alibi_slopes must be given"):
        backward(needs=(False,) * 4 + (True, False))
    with pytest.raises(RuntimeError, match="sinks must be given"):
        backward(needs=(False,) * 5 + (True,))
    with pytest.raises(RuntimeError, match="needs must have 6 entries"):
        backward(needs=(True,))
    with pytest.raises(RuntimeError, match="dout must have shape"):
        backward(out=out[:, :4])
