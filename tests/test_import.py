"""What `import flash_attn` and a first call bring with them: time before a program starts."""

from __future__ import annotations

import json
import subprocess
import sys

_HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.nn.attention.bias", "torch.onnx")


def _brings(code: str, before: str = "import torch") -> list[str]:
    """Modules that `code` loads, without this package's own."""
    brought = "print(json.dumps([*set(sys.modules) - before]))"
    program = f"import json, sys\n{before}\nbefore = set(sys.modules)\n{code}\n{brought}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    return [name for name in json.loads(result.stdout) if name.split(".")[0] != "flash_attn"]


def _is_heavy(name: str) -> bool:
    return name.split(".")[0] in ("sympy", "numpy") or name.startswith(_HEAVY)


def test_the_import_brings_next_to_nothing() -> None:
    brought = _brings("import flash_attn")
    assert not [name for name in brought if _is_heavy(name)]
    assert len(brought) < 20


def test_flops_are_counted_when_the_counter_comes_after() -> None:
    code = """if True:
        assert "torch.utils.flop_counter" not in sys.modules
        from torch.utils.flop_counter import FlopCounterMode
        x = torch.randn(1, 2, 5, 8, requires_grad=True)
        with FlopCounterMode(display=False) as flops:
            flash_attn.scaled_dot_product_attention(x, x, x).sum().backward()
        assert flops.get_total_flops() == 2 * 2 * 5 * 5 * 8 * 7
        assert not any(type(finder).__module__.startswith("flash_attn.torch_op") for finder in sys.meta_path)
    """
    _brings(code, before="import torch, flash_attn")


def test_a_first_call_brings_no_compiler() -> None:
    brought = _brings(
        "x = torch.randn(1, 1, 4, 8, requires_grad=True)\n"
        "flash_attn.scaled_dot_product_attention(x, x, x, dropout_p=0.5).sum().backward()\n"
        "with flash_attn.replace_sdpa():\n"
        "    torch.nn.functional.scaled_dot_product_attention(x, x, x, torch.ones(4, 4).bool()).sum().backward()",
        before="import torch, flash_attn",
    )
    assert not [name for name in brought if _is_heavy(name)]


def test_a_causal_bias_is_known_wherever_it_comes_from() -> None:
    code = """if True:
        from torch.nn.attention.bias import causal_lower_right
        q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
        out = flash_attn.scaled_dot_product_attention(q, k, k, causal_lower_right(3, 5))
        torch.testing.assert_close(
            out, torch.nn.functional.scaled_dot_product_attention(q, k, k, torch.ones(3, 5).bool().tril(2))
        )
    """
    assert "torch.nn.attention.bias" in _brings(code, before="import torch, flash_attn")
