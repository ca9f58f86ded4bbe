"""max_seqlen is a bound on the sequences and nothing else: results, time and memory are those of the sequences."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.torch_op import attention as ops
from flash_attn.torch_op.arguments import Options
from introspection import _C, needs_kernels

LENGTHS = [100, 37, 0, 64]
CARELESS = 1 << 20


DEVICES = [
    ("cpu", torch.float32, 16),
    pytest.param(("cuda", torch.float32, 16), marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float64, 72), marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16, 64), marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16, 128), marks=pytest.mark.gpu),
]


def _gradients(
    kind: tuple[str, torch.dtype, int], lengths: list[int], max_seqlen: int, heads_k: int, alike: bool
) -> list[torch.Tensor]:
    """`alike`: one tensor says the lengths of queries and of keys, which planners take as a promise."""
    device, dtype, head_dim = kind
    torch.manual_seed(0)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = int(starts[-1]) + 5
    q = torch.randn(total, 4, head_dim).to(device, dtype).requires_grad_()
    k, v = (torch.randn(total, heads_k, head_dim).to(device, dtype).requires_grad_() for _ in range(2))
    starts_q = starts.to(device)
    starts_k = starts_q if alike else starts_q.clone()
    bounds = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
    out, lse = ops.attention(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, deterministic=True, **bounds)
    results = [out, lse.mT, *torch.autograd.grad(out.square().sum(), (q, k, v))]
    for rows, nothing in zip(results, (0, -torch.inf, 0, 0, 0), strict=True):  # behind the last sequence
        assert torch.equal(rows[-5:], torch.full_like(rows[-5:], nothing))
    return results


@pytest.mark.parametrize("kind", DEVICES, ids=str)
@pytest.mark.parametrize("heads_k", [4, 1])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, [*LENGTHS, 300, 1, 129] * 8], ids=["few", "many"])
def test_results_do_not_depend_on_it(
    kind: tuple[str, torch.dtype, int], lengths: list[int], alike: bool, heads_k: int
) -> None:
    close, careless = (_gradients(kind, lengths, bound, heads_k, alike) for bound in (max(lengths), CARELESS))
    for expected, actual in zip(close, careless, strict=True):
        if expected.dtype == torch.bfloat16:  # another plan may sum in another order
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
        elif kind[1] == torch.bfloat16:
            torch.testing.assert_close(actual, expected)
        else:
            assert torch.equal(actual, expected)


def test_it_may_be_left_out_or_lie_where_reading_it_would_wait() -> None:
    starts = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.randn(int(starts[-1]), 4, 16)

    def run(q: torch.Tensor, bound: Any) -> torch.Tensor:
        return flash_attn_varlen_func(q, q, q, starts, starts, bound, bound, causal=True)

    longest = max(LENGTHS)
    expected = run(q, longest)
    elsewhere = torch.tensor(longest, device="meta")  # which cannot be read at all
    for bound in (None, elsewhere, torch.tensor(longest), torch.tensor([longest], dtype=torch.int32)):
        assert torch.equal(run(q, bound), expected)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, torch.tensor(longest)), expected)
    with pytest.raises(RuntimeError, match="max_seqlen_q must be at least the longest sequence, but is 5"):
        run(q, torch.tensor(5))
    for bound in (torch.tensor(7.0), torch.tensor([7, 7])):
        with pytest.raises(TypeError, match="max_seqlen_q must be an int or a tensor of one integer"):
            run(q, bound)


def test_keys_of_one_length_need_no_bound() -> None:
    starts, used = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 6], [4, 9]))
    q, cache = torch.randn(6, 4, 8), torch.randn(2, 9, 2, 8)
    out = flash_attn_varlen_func(q, cache, cache, starts, None, 3, None, causal=True, seqused_k=used)
    for b, n in enumerate((4, 9)):
        part = cache[b : b + 1, :n]
        expected = flash_attn_func(q[None, 3 * b : 3 * b + 3], part, part, causal=True)
        torch.testing.assert_close(out[3 * b : 3 * b + 3], expected[0])


# An address space that has no room for batch * the bound, nor for batch * the longest sequence.
_PROGRAM = """
    import resource
    import torch
    from flash_attn.torch_op import attention as ops

    def train(lengths, max_seqlen):
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        total = int(starts[-1])
        q = torch.randn(total, 4, 64, requires_grad=True)
        k, v = (torch.randn(total, 2, 64, requires_grad=True) for _ in range(2))
        out, _ = ops.attention(
            q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            window_left=16, window_right=16,
        )
        out.sum().backward()

    torch.set_num_threads(1)
    train([100] * 4, 100)  # threads, libraries
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20), used + (160 << 20)))
    train([100] * 64, 1 << 20)
    train([8192] + [10] * 200, 1 << 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_on_the_cpu_is_the_sequences() -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PROGRAM)], capture_output=True, text=True, cwd="/", check=False
    )
    assert result.returncode == 0, result.stderr


H200, A100 = (90, 132, 232448, 60 << 20), (80, 108, 166912, 40 << 20)


def _plan(
    max_seqlen: int | tuple[int, int],
    *,
    sequences: int = 64,
    heads: int = 8,
    heads_k: int = 8,
    head_dim: int = 64,
    dtype: str = "bfloat16",
    window_right: int = -1,
    device: tuple[int, int, int, int] = H200,
) -> dict[str, Any]:
    """Of so many sequences with 100 rows on average."""

    def tensor(n: int) -> tuple[int, str, int, list[int], list[int]]:
        return (1 << 20, dtype, 0, [100 * sequences, n, head_dim], [n * head_dim, head_dim, 1])

    starts = (1 << 20, "int32", 0, [sequences + 1], [1])
    tensors = {"q": tensor(heads), "k": tensor(heads_k), "v": tensor(heads_k)}
    bounds = max_seqlen if isinstance(max_seqlen, tuple) else (max_seqlen, max_seqlen)
    options = Options(*bounds, None, 0, -1, window_right, 0.0, 0.0, False, False)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return _C.plan(tensors | packed, options._asdict(), [True] * 3 + [False] * 3, device)


@needs_kernels("universal")
@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim, heads_k", [(64, 8), (128, 2), (256, 8)])
@pytest.mark.parametrize("window_right", [-1, 0])
def test_plans_do_not_depend_on_it(
    device: tuple[int, int, int, int], dtype: str, head_dim: int, heads_k: int, window_right: int
) -> None:
    problem: dict[str, Any] = {"device": device, "dtype": dtype, "head_dim": head_dim, "heads_k": heads_k}
    problem["window_right"] = window_right
    close, total = _plan(100, **problem), _plan(6400, **problem)
    assert _plan(CARELESS, **problem) == total  # no sequence is longer than all together
    assert _plan((100, CARELESS), **problem) == _plan((CARELESS, 100), **problem) == close  # of the same lengths
    for way in ("forward", "backward"):  # the choice of tile and of flags may follow what is known of the lengths
        assert close[way]["family"] == total[way]["family"]
        assert close[way]["workspace_bytes"] == pytest.approx(total[way]["workspace_bytes"], rel=1e-3)
    if dtype == "bfloat16" and device == H200:  # what stays in L2 is a matter of the mean length
        groups = [choice["backward"]["decisions"]["heads_per_group"] for choice in (close, total)]
        assert groups[0] == groups[1]


@needs_kernels("sm90")
def test_no_family_refuses_a_careless_bound() -> None:
    for max_seqlen in (100, CARELESS):
        for choice in _plan(max_seqlen, sequences=8192, heads=32).values():
            assert choice["family"] == "sm90"


def test_a_mask_is_as_large_as_the_bound() -> None:
    starts = torch.tensor([0, 3, 9], dtype=torch.int32)
    q = torch.randn(9, 2, 8)
    mask = torch.randn(2, 1, 200, 140)

    def gradient(rows: int, columns: int) -> list[torch.Tensor]:
        part = mask[:, :, :rows, :columns].clone().requires_grad_()
        lengths = {"max_seqlen_q": rows, "max_seqlen_k": columns}
        out, _ = ops.attention(q, q, q, part, cu_seqlens_q=starts, cu_seqlens_k=starts, **lengths)
        return [out, *torch.autograd.grad(out.square().sum(), part)]

    (out, dmask), (wide_out, wide_dmask) = gradient(6, 6), gradient(200, 140)
    assert torch.equal(out, wide_out)
    assert torch.equal(wide_dmask[:, :, :6, :6], dmask)
    assert not wide_dmask[:, :, 6:].any()
    assert not wide_dmask[:, :, :, 6:].any()
