"""`explain` and `python -m flash_attn`."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn import FlashMHA, explain, flash_attn_func, flash_attn_with_kvcache, replace_sdpa
from flash_attn import scaled_dot_product_attention as sdpa
from introspection import needs_introspection

pytestmark = needs_introspection


def test_it_says_kernel_tile_memory_and_copies() -> None:
    q = torch.randn(2, 4, 64, 32, requires_grad=True)
    k = torch.randn(2, 4, 32, 64).transpose(-1, -2)
    explanation = explain(q, k, k, is_causal=True)
    (call,) = explanation.calls
    assert call.forward.family == "cpu" and call.backward is not None
    assert min(call.forward.tile) > 0
    assert call.output_bytes == 4 * 2 * 4 * 64 * (32 + 1) == call.saved_bytes
    assert [text.split(",")[0] for text in call.copies] == ["k", "v"]
    assert "causal 1" in str(explanation) and "forward" in str(explanation)


def test_any_function_or_module_can_be_explained() -> None:
    module = FlashMHA(32, 4)
    x = torch.randn(2, 9, 32)
    assert len(explain(lambda: module(module(x))).calls) == 2
    with torch.no_grad():
        (call,) = explain(flash_attn_func, *(torch.randn(1, 5, 2, 8) for _ in range(3)), causal=True).calls
    assert call.backward is None and call.saved_bytes == 0


def test_other_threads_go_on_computing() -> None:
    q = torch.randn(1, 2, 5, 8)
    expected, results, stop = sdpa(q, q, q), [], threading.Event()

    def attend() -> None:
        while not stop.is_set():
            results.append(sdpa(q, q, q))

    def explained() -> None:
        before = len(results)
        while len(results) < before + 20:
            sdpa(q, q, q)

    thread = threading.Thread(target=attend)
    thread.start()
    try:
        calls = explain(explained).calls
    finally:
        stop.set()
        thread.join()
    assert calls and all(torch.equal(x, expected) for x in results)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_function_is_seen_and_stays_what_it_is(backend: str, fullgraph: bool, warm: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sdpa(x, x, x) + 1, backend=backend, fullgraph=fullgraph)
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    if warm:
        compiled(x)
    (call,) = explain(compiled, x).calls
    assert call.backward is not None
    torch.testing.assert_close(compiled(x), sdpa(x, x, x) + 1)


def test_threads_that_explain_leave_compilation_as_it_was() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: x + 1, backend=counter)
    inside, leave = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def explained(i: int) -> None:
        inside[i].set()
        leave[i].wait(10)

    threads = [threading.Thread(target=explain, args=(explained, i)) for i in range(2)]
    for i, thread in enumerate(threads):
        thread.start()
        inside[i].wait(10)
    for i, thread in enumerate(threads):  # first in, first out
        compiled(torch.ones(1))
        assert counter.frame_count == 0
        leave[i].set()
        thread.join()
    compiled(torch.ones(1))
    assert counter.frame_count == 1


@pytest.mark.parametrize("random", [False, True])
def test_function_transforms_are_seen(random: bool) -> None:
    x = torch.randn(3, 1, 2, 5, 8)
    dropout_p = 0.5 if random else 0.0

    def loss(x: Tensor) -> Tensor:
        return sdpa(x, x, x, dropout_p=dropout_p).sum()

    forward = explain(torch.vmap(loss, randomness="different"), x).calls
    assert all(call.backward is None for call in forward)
    both = explain(torch.vmap(torch.func.grad(loss), randomness="different"), x).calls
    assert all(call.backward is not None for call in both)
    assert len(forward) == len(both) == (3 if random else 1)
    if not random:
        assert "(3, 2, 5, 8)" in both[0].problem  # what is mapped over is in the batch


def test_a_training_step_is_seen_and_gets_zero_gradients() -> None:
    model, x = nn.Sequential(FlashMHA(16, 2), FlashMHA(16, 2, dropout=0.5)), torch.randn(2, 5, 16)

    def step() -> None:
        model.zero_grad()
        model(x).square().sum().backward()

    calls = explain(step).calls
    assert [call.backward is not None for call in calls] == [True, True]
    assert model[0].W_q.weight.grad is not None and not model[0].W_q.weight.grad.any()
    assert model[1].W_o.bias.grad is not None and model[1].W_o.bias.grad.all()
    with torch.no_grad():
        assert [call.backward for call in explain(model, x).calls] == [None, None]


def test_a_pass_that_is_not_differentiated_is_told_from_its_recomputation() -> None:
    layer, x = FlashMHA(16, 2), torch.randn(2, 5, 16, requires_grad=True)
    calls = explain(lambda: checkpoint(layer, x, use_reentrant=True).sum().backward()).calls
    assert [call.backward is not None for call in calls] == [False, True]


def test_a_backward_pass_alone_is_a_call() -> None:
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    loss = sdpa(x, x, x).sum()
    (call,) = explain(loss.backward).calls
    assert call.backward is not None


@pytest.mark.parametrize("attend", [sdpa, flash_attn_func])
def test_dropout_draws_nothing(attend: Callable[..., Any]) -> None:
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    state = torch.get_rng_state()
    (call,) = explain(lambda: attend(x, x, x, dropout_p=0.5).sum().backward()).calls
    assert "dropout_p 0.5" in call.problem and torch.equal(torch.get_rng_state(), state)


def test_torchs_own_kernels_are_named() -> None:
    x = torch.randn(1, 2, 5, 8)
    explanation = explain(lambda: F.scaled_dot_product_attention(x, x, x))
    assert not explanation.calls and len(explanation.torch_ops) == 1
    assert "torch's own" in str(explanation) and "flash_attention_for_cpu" in str(explanation)
    nothing = explain(lambda: None)
    assert not nothing.torch_ops and "CUDA graph" in str(nothing)
    with replace_sdpa():
        assert explain(lambda: F.scaled_dot_product_attention(x, x, x)).torch_ops == []


def test_fake_tensors_can_be_explained() -> None:
    with FakeTensorMode():
        q = torch.randn(1, 2, 64, 32)
        (call,) = explain(q, q, q).calls
    assert call.output_bytes == 4 * 2 * 64 * (32 + 1)


def test_what_cant_be_made_meanwhile_is_said() -> None:
    q, bias = torch.randn(1, 2, 5, 8), causal_lower_right(5, 5)
    assert explain(lambda: sdpa(q, q, q, bias)).calls
    with pytest.raises(RuntimeError, match="make it before"):
        explain(lambda: sdpa(q, q, q, causal_lower_right(5, 5)))


def test_results_lie_in_memory_as_they_would() -> None:
    q = torch.randn(2, 5, 3, 8).transpose(1, 2)
    strides = []
    explain(lambda: strides.append(sdpa(q, q, q).stride()))
    assert strides == [q.stride()]


def test_a_refused_call_raises_its_reason() -> None:
    q = torch.randn(2, 4, 8, 16)
    with pytest.raises(RuntimeError, match="dropout_p"):
        explain(q, q, q, dropout_p=2.0)


def test_the_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(2, 4, 8, 16)
    monkeypatch.setenv("FLASH_ATTN_CPU", "generic")
    assert "generic" in explain(q, q, q).calls[0].forward.kernel


def test_the_command_prints_what_is_there_and_checks_itself() -> None:
    result = subprocess.run([sys.executable, "-m", "flash_attn"], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"flash_attn {flash_attn.__version__}" in result.stdout and "all right" in result.stdout


def test_attention_over_a_cache_is_explained_and_appends_nothing() -> None:
    cache = torch.zeros(2, 8, 2, 16)
    q = torch.randn(2, 1, 4, 16)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    explanation = explain(
        flash_attn_with_kvcache,
        q,
        cache,
        cache,
        torch.ones(2, 1, 2, 16),
        torch.ones(2, 1, 2, 16),
        cache_seqlens=lengths,
    )
    (call,) = explanation.calls
    assert call.forward.family == "cpu" and call.backward is None
    assert "k_cache (2, 8, 2, 16)" in call.problem and call.output_bytes == q.numel() * 4 + 8 * 4
    assert not cache.any()
    assert len(explain(lambda: flash_attn_with_kvcache(q, cache, cache)).calls) == 1
