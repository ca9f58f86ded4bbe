"""`explain` and `python -m flash_attn`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import flash_attn
from flash_attn import FlashMHA, explain, flash_attn_func


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
