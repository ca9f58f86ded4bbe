"""Memory grows with the sequence, not with its square."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from flash_attn import scaled_dot_product_attention
from flash_attn.torch_op import attention as ops
from flash_attn.torch_op.arguments import Options
from flash_attn.torch_op.library import backward_op

_PROGRAM = """
    import resource
    import torch
    from flash_attn import scaled_dot_product_attention

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()

    def peak():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))

    small = [torch.randn(1, 1, 256, 64, requires_grad=True) for _ in range(3)]
    scaled_dot_product_attention(*small).sum().backward()  # threads, libraries
    inputs = [torch.randn(1, 1, 65536, 64).requires_grad_() for _ in range(3)]
    before = resident()
    {mask}
    scaled_dot_product_attention(*inputs, mask, is_causal={causal}).sum().backward()
    print(peak() - before)
"""


@pytest.mark.parametrize("causal, mask", [(True, "mask = None"), (True, "mask = torch.rand(1, 65536) > 0.5")])
def test_65536_tokens_take_under_200_mb_above_the_inputs(causal: bool, mask: str) -> None:
    program = textwrap.dedent(_PROGRAM).format(causal=causal, mask=mask)
    # In another folder: the clone's own flash_attn/ would shadow the installed one.
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 200e6


@pytest.mark.gpu
def test_cuda_memory_is_linear() -> None:
    def peak(length: int) -> int:
        inputs = [torch.randn(1, 2, length, 64, device="cuda", requires_grad=True) for _ in range(3)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        scaled_dot_product_attention(*inputs, is_causal=True).sum().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(16384) < 2.2 * peak(8192)


def test_scratch_that_cannot_be_had_says_so_in_torchs_words() -> None:
    rows = 1 << 46  # of stride 0: only the scratch memory for their statistics would need so much
    q, k, v = (torch.zeros(1, 1, 1, 8) for _ in range(3))
    q, lse = q.expand(1, rows, 1, 8), torch.zeros(1, 1, 1).expand(1, 1, rows)
    needs = [False, False, True, False, False, False]
    options = Options(rows, 1, None, 0, -1, -1, 0.0, 0.0, False, False)
    with pytest.raises(RuntimeError, match=f"DefaultCPUAllocator: can't allocate memory.* {4 * rows} bytes") as error:
        backward_op(q, None, q, k, v, *(None,) * 9, q, lse, needs, *options)
    assert type(error.value) is RuntimeError


def test_results_that_cannot_be_had_say_so_in_torchs_words() -> None:
    rows = 1 << 46
    q, k = torch.zeros(1, 1, 1, 8).expand(1, rows, 1, 8), torch.zeros(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match=f"DefaultCPUAllocator: can't allocate memory.* {32 * rows} bytes"):
        ops.attention(q, k, k)
