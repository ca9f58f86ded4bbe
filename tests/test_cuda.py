"""What is particular to CUDA: devices, streams, graphs, memory, sizes, and the choice of a family."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import explain
from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.torch_op import attention as ops
from introspection import needs_introspection
from problems import (
    HOPPER_BIASED,
    HOPPER_EXTENDED,
    HOPPER_FORWARD,
    Problem,
    check_all,
    forward_head_dims,
)
from random_problems import random_masked_problem, random_problem

pytestmark = pytest.mark.gpu
FORCED = os.environ.get("FLASH_ATTN_FORCE")
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")


def _qkv(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]


def _step(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> tuple[Tensor, ...]:
    """The same bits each time."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        out = sdpa(q, k, v, is_causal=True, dropout_p=dropout)
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cuda_graphs_capture_a_training_step_and_replays_draw_fresh_masks(dropout: float) -> None:
    q, k, v = _qkv(2, 3, 130, 64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(q, k, v, dropout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _step(q, k, v, dropout)
    graph.replay()
    first = [x.clone() for x in results]
    graph.replay()
    second = [x.clone() for x in results]
    if dropout:
        assert not torch.equal(first[0], second[0])
    else:
        for a, b, c in zip(first, second, _step(q, k, v), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_tensors_that_lie_otherwise_at_the_same_address_are_read_as_they_lie() -> None:
    """Hopper's launches remember how tensors lay there before."""
    memory = torch.randn(3, 1 << 16, dtype=torch.bfloat16, device="cuda")
    sizes = ((1, 4, 64, 64), (1, 2, 128, 64), (2, 2, 64, 64), (1, 2, 64, 128), (1, 1, 300, 64))
    for batch, heads, rows, columns in sizes * 2:
        count = batch * heads * rows * columns
        for by_rows in (False, True):
            shape = (batch, rows, heads, columns) if by_rows else (batch, heads, rows, columns)
            q, k, v = (x[:count].view(shape).transpose(1, 2) if by_rows else x[:count].view(shape) for x in memory)
            expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
            torch.testing.assert_close(sdpa(q, k, v).float(), expected, rtol=2e-2, atol=2e-2)


def test_nothing_waits_for_the_device() -> None:
    q, k, v = _qkv(2, 3, 130, 64)
    packed = [x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in (q, k, v)]
    starts = torch.tensor([0, 100, 260], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(q, k, v, 0.1)
        out, _ = ops.attention(*packed, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=160, max_seqlen_k=160)
        torch.autograd.grad(out.sum(), packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_runs_on_the_current_stream() -> None:
    q, k, v = _qkv(2, 3, 1000, 64)
    expected = _step(q, k, v)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [(x * 1).detach().requires_grad_() for x in (q, k, v)]
        got = _step(*late)
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@two_devices
def test_it_runs_where_its_tensors_are_whatever_device_is_current() -> None:
    q, k, v = _qkv(2, 3, 130, 64)
    expected = _step(q, k, v)
    others = [x.detach().to("cuda:1").requires_grad_() for x in (q, k, v)]
    with torch.cuda.device(0):
        got = _step(*others)
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())
    with pytest.raises(RuntimeError, match="k must be on q's device"):
        sdpa(q, others[1], others[2])


@two_devices
def test_two_devices_train_at_once() -> None:
    """A thread a device, each on a stream of its own."""
    results: dict[int, list[tuple[Tensor, ...]]] = {}

    def train(device: int) -> None:
        torch.cuda.set_device(device)
        with torch.cuda.stream(torch.cuda.Stream()):
            generator = torch.Generator("cuda").manual_seed(7)
            q, k, v = (
                torch.randn(2, 8, 1000, 64, dtype=torch.bfloat16, device="cuda", generator=generator).requires_grad_()
                for _ in range(3)
            )
            results[device] = []
            for _ in range(20):
                out, _ = ops.attention(q, k, v, heads_first=True, causal=ops.TOP_LEFT, deterministic=True)
                results[device].append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=train, args=(device,)) for device in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [x.cpu() for x in results[0][0]]
    for device in range(2):
        assert len(results[device]) == 20
        for step in results[device]:
            assert all(x.device.index == device for x in step)
            assert all(torch.equal(x.cpu(), y) for x, y in zip(step, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thread_that_never_used_cuda_can_call_it(dtype: torch.dtype) -> None:
    """Autograd's thread may be one: it has no CUDA context until something makes one."""
    q, k, v = _qkv(1, 2, 128, 64, dtype=dtype)
    expected, _ = ops.attention(q, k, v, heads_first=True)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(ops.attention(q, k, v, heads_first=True)[0].detach()))
    thread.start()
    thread.join()
    assert len(results) == 1 and torch.equal(results[0], expected)


def _check_repeats(shape: tuple[int, ...], dtype: torch.dtype, causal: int, repeats: int) -> None:
    q, k, v = _qkv(*shape, dtype=dtype)
    dout = torch.randn_like(v)

    def step() -> tuple[Tensor, ...]:
        out, lse = ops.attention(q, k, v, heads_first=True, causal=causal, deterministic=True)
        return (out, lse, *torch.autograd.grad(out, (q, k, v), dout))

    first = step()
    for _ in range(repeats):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_for_bit(dtype: torch.dtype, head_dim: int) -> None:
    _check_repeats((2, 3, 700, head_dim), dtype, ops.TOP_LEFT, 200 if dtype == torch.bfloat16 else 20)


@pytest.mark.skipif(FORCED == "universal", reason="no tile of that family waits for another")
@pytest.mark.parametrize("causal", [ops.NONE, ops.TOP_LEFT])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_results_of_many_tiles_repeat_bit_for_bit(head_dim: int, causal: int) -> None:
    """Several tiles for each CTA of a large GPU: see _many_tiles()."""
    _check_repeats((20, 8, 600, head_dim), torch.bfloat16, causal, 200)


@pytest.mark.parametrize("causal", [ops.NONE, ops.TOP_LEFT])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_results_of_few_tiles_repeat_bit_for_bit(head_dim: int, causal: int) -> None:
    """CTAs have parts of a head's query rows: see _few_tiles()."""
    _check_repeats((1, 3, 1500, head_dim), torch.bfloat16, causal, 200)


def test_out_of_memory_is_torchs_error_and_says_how_much() -> None:
    free, _ = torch.cuda.mem_get_info()
    rows = free // 64 // 4 + 2**24
    q = torch.zeros(64, device="cuda").expand(1, 1, rows, 64)
    k = torch.zeros(1, 1, 1, 64, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match="MiB for out"):
        sdpa(q, k, k)


def test_tensors_beyond_2_to_the_31_elements() -> None:
    batch, heads, rows = 2**15 + 3, 16, 70
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    q = torch.randn(batch, heads, rows, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
    assert q.numel() > 2**31
    out = sdpa(q, q, q, is_causal=True)
    (gradient,) = torch.autograd.grad(out, q, out.detach())
    for b in (0, batch // 2, batch - 1):
        x = q[b : b + 1].detach().requires_grad_()
        expected = sdpa(x, x, x, is_causal=True)
        assert torch.equal(out[b : b + 1], expected)
        torch.testing.assert_close(gradient[b : b + 1], torch.autograd.grad(expected, x, expected.detach())[0])


@pytest.mark.parametrize("batch, heads", [(70_000, 1), (1, 70_000), (300, 300)])
def test_more_than_65535_heads_and_sequences(batch: int, heads: int) -> None:
    x = torch.randn(batch, heads, 3, 8, device="cuda", requires_grad=True)
    out = sdpa(x, x, x)
    expected = torch.softmax(x @ x.transpose(-1, -2) / 8**0.5, -1) @ x
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    got, want = (torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@needs_introspection
def test_a_forced_family_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv(1, 2, 64, 64)
    monkeypatch.setenv("FLASH_ATTN_FORCE", "universal")
    assert explain(q, k, v).calls[0].forward.family == "universal"
    monkeypatch.setenv("FLASH_ATTN_FORCE", "tpu")
    with pytest.raises(RuntimeError, match=r"FLASH_ATTN_FORCE=tpu.*no such family"):
        sdpa(q, k, v)
    if torch.cuda.get_device_capability() == (9, 0):
        monkeypatch.setenv("FLASH_ATTN_FORCE", "sm90")
        with pytest.raises(RuntimeError, match=r"FLASH_ATTN_FORCE=sm90.*neither bfloat16, float16 nor float32"):
            sdpa(q.double(), k.double(), v.double())


def _tensor_core_problem(seed: int) -> Problem:
    """A random problem that the tensor-core families take."""
    problem = random_problem(seed, (torch.bfloat16, torch.float16), max_seqlen=700)
    dims = (8, 64, 72, 96, 128, 192, 256)
    head_dim = dims[seed % 7]
    plain = replace(problem, mask="", softcap=0.0, slopes="", sinks=False, dropout=0.0, scale=None, head_dim=head_dim)
    layout = {"strided": "dense", "misaligned": "qkv" if not plain.packed else "dense"}.get(plain.layout, plain.layout)
    return replace(plain, head_dim_v=128 if head_dim in (192, 256) and seed % 2 else head_dim, layout=layout)


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_problems_of_the_tensor_core_families(first: int) -> None:
    check_all([_tensor_core_problem(seed) for seed in range(first, first + 50)], "cuda")


@pytest.mark.skipif(FORCED == "universal", reason="another family is forced")
@pytest.mark.parametrize("name", HOPPER_FORWARD)
def test_every_hopper_forward_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on problems for which the planner would choose another one."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("there is no device of compute capability 9.0")
    head_dim, head_dim_v = forward_head_dims(name)
    problems = [
        replace(_tensor_core_problem(seed), head_dim=head_dim, head_dim_v=head_dim_v, seed=seed) for seed in range(30)
    ]
    if "cluster" in name:  # these take no packed query rows
        problems = [replace(problem, packed=False, one_starts=False) for problem in problems]
    monkeypatch.setenv("FLASH_ATTN_FORWARD_KERNEL", name)
    check_all(problems, "cuda", "cuda")


@pytest.mark.skipif(FORCED not in (None, "sm90"), reason="another family is forced")
@pytest.mark.parametrize("name", sorted({*HOPPER_EXTENDED, *HOPPER_BIASED}))
def test_every_hopper_kernel_for_masks_and_rules_of_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("there is no device of compute capability 9.0")
    head_dim = forward_head_dims(name)[0]
    problems = [
        replace(random_masked_problem(seed), head_dim=head_dim, head_dim_v=head_dim, mask=mask, seed=seed)
        for mask, names in (("bool", HOPPER_EXTENDED), ("float", HOPPER_BIASED))
        for seed in range(20)
        if name in names
    ]
    monkeypatch.setenv("FLASH_ATTN_FORWARD_KERNEL", name)
    check_all(problems, "cuda", "cuda")


@pytest.mark.skipif(FORCED not in (None, "sm90"), reason="another family is forced")
def test_rows_that_see_the_lowest_number_alone_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lse is that number; what P is divided by is counted again. Problems that were wrong without."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("there is no device of compute capability 9.0")
    problems = [random_masked_problem(seed) for seed in (5774, 21344)]
    assert all(p.mask_kind == "lowest" and p.head_dim <= 128 for p in problems)
    monkeypatch.setenv("FLASH_ATTN_FORCE", "sm90")
    check_all(problems, "cuda", "cuda")


def _many_tiles() -> list[Problem]:
    """Several tiles for each CTA of a large GPU, so that CTAs work on what others have added up or prepared."""
    base = Problem(dtype=torch.bfloat16, batch=20, heads=8, heads_k=8, seqlen_q=600, seqlen_k=600)
    problems = [
        replace(base, head_dim=d, head_dim_v=d, causal=causal, deterministic=deterministic)
        for d in (64, 96, 128, 192, 256)
        for causal in (0, 1)
        for deterministic in (False, True)
    ]
    for d in (64, 128):
        sized = replace(base, head_dim=d, head_dim_v=d)
        problems += [
            replace(sized, dtype=torch.float16),
            replace(sized, heads=16, heads_k=8),
            replace(sized, heads=16, heads_k=8, causal=1),
            replace(sized, seqlen_q=520, seqlen_k=700, causal=1),
            replace(sized, seqlen_q=520, seqlen_k=700, causal=2),
            replace(sized, seqlen_q=700, seqlen_k=520, causal=2),
            replace(sized, seqlen_q=700, seqlen_k=520),
            replace(sized, seqlen_q=1000, seqlen_k=100, heads=32, heads_k=32),
            replace(sized, window=(100, 0)),
            replace(sized, window=(100, 50)),
            replace(sized, window=(100, -1)),
            replace(sized, seqlen_q=130, seqlen_k=130, batch=60),
            replace(sized, dtype=torch.float16, packed=True, causal=1),
        ]
    for d in (64, 96, 128, 192, 256):
        sized = replace(base, head_dim=d, head_dim_v=d, batch=13, seqlen_q=1150, seqlen_k=1150)
        packed = replace(sized, packed=True, one_starts=True)
        problems += [
            packed,
            replace(packed, causal=1, seed=2),
            replace(packed, causal=1, deterministic=True, seed=3),
            replace(packed, deterministic=True, seed=11),
            replace(packed, causal=1, heads_k=4, use_lse=True, seed=12),
            replace(packed, dtype=torch.float16, window=(200, 0), seed=14),
            replace(packed, batch=100, seqlen_q=200, seqlen_k=200, seed=6),
        ]
    for d, d_v in ((64, 64), (72, 40), (96, 96), (128, 128), (192, 128), (192, 192), (256, 200)):
        sized = replace(base, head_dim=d, head_dim_v=d_v)
        problems += [
            replace(sized, use_lse=True, causal=1),
            replace(sized, heads=32, heads_k=8, batch=10),
            replace(sized, seqlen_q=1500, seqlen_k=256, heads=4, heads_k=4),
            replace(sized, seqlen_q=256, seqlen_k=1500, heads=4, heads_k=4, causal=1),
            replace(sized, seqlen_q=2500, seqlen_k=2500, batch=3, causal=1),
            replace(sized, seqlen_q=750, seqlen_k=310, causal=ops.BOTTOM_RIGHT, deterministic=True),
        ]
    return problems


def _few_tiles() -> list[Problem]:
    """So few that CTAs have parts of a head's query rows."""
    base = Problem(dtype=torch.bfloat16, batch=1, heads=3, heads_k=3, seqlen_q=900, seqlen_k=900)
    problems = []
    for d, d_v in ((64, 64), (72, 40), (96, 96), (128, 128), (192, 128), (192, 192), (256, 200)):
        sized = replace(base, head_dim=d, head_dim_v=d_v)
        problems += [
            sized,
            replace(sized, causal=ops.TOP_LEFT),
            replace(sized, deterministic=True),
            replace(sized, causal=ops.TOP_LEFT, deterministic=True, use_lse=True),
            replace(sized, seqlen_q=1500, seqlen_k=100),
            replace(sized, seqlen_q=1500, seqlen_k=700, causal=ops.BOTTOM_RIGHT),
            replace(sized, seqlen_q=1000, seqlen_k=1500, causal=ops.BOTTOM_RIGHT, deterministic=True),
            replace(sized, dtype=torch.float16, heads=4, heads_k=2, causal=ops.TOP_LEFT),
            replace(sized, heads=1, heads_k=1, seqlen_q=4000, seqlen_k=4000, causal=ops.TOP_LEFT),
            replace(sized, batch=2, used_q=True, used_k=True),
            replace(sized, frozen=("k",), layout="heads_first"),
        ]
    return problems


@pytest.mark.parametrize("problem", _few_tiles(), ids=repr)
def test_gradients_of_few_tiles(problem: Problem) -> None:
    check_all([problem], "cuda", reference_device="cuda")


@pytest.mark.parametrize("problem", _many_tiles(), ids=repr)
def test_gradients_of_many_tiles(problem: Problem) -> None:
    check_all([problem], "cuda", reference_device="cuda")
