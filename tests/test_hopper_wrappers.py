"""The small layer over Hopper's instructions (csrc/cuda/sm90/hopper), each wrapper alone, bit for bit.

The kernels of hopper_wrappers.cu are compiled here, for which `nvcc` must be there; to run they need compute capability
9.0. Matrices hold small integers, so that sums are exact in any order.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nvcc import compiled, needs_nvcc

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

pytestmark = needs_nvcc
on_hopper = pytest.mark.skipif(not HOPPER, reason="there is no device of compute capability 9.0")

DTYPES = {torch.bfloat16: True, torch.float16: False}
COLUMNS, ROWS = 0, 1  # enum Major


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    sources = ("csrc/cuda/sm90/hopper/tensor_map.cpp", "csrc/cuda/common/check.cpp")
    return compiled(tmp_path_factory.mktemp("wrappers"), "tests/hopper_wrappers.cu", *sources)


def run(function: Callable[..., int], *arguments: Tensor | int | bool) -> None:
    """Calls it with the addresses of tensors; raises if CUDA reports an error."""
    torch.cuda.synchronize()
    error = function(*(ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments))
    assert error == 0, f"CUDA error {error}"


def small_integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-4, 5, shape, device="cuda").to(dtype)


def swizzled(box: Tensor) -> Tensor:
    """(rows, 64) 16-bit elements as they lie in shared memory: chunk c of 16 bytes of row r at chunk c ^ (r % 8)."""
    chunks = box.view(-1, 8, 8)
    rows = torch.arange(len(chunks), device=box.device)[:, None]
    return chunks[rows, torch.arange(8, device=box.device)[None] ^ rows % 8].reshape(-1, 64)


def test_they_compile(library: ctypes.CDLL) -> None:
    assert library.test_wgmma is not None


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (64, 80, 96, 128, 192, 256))
def test_wgmma(library: ctypes.CDLL, n: int, dtype: torch.dtype) -> None:
    variants = [(False, COLUMNS, COLUMNS), (False, COLUMNS, ROWS), (False, ROWS, ROWS)]
    variants += [(True, COLUMNS, COLUMNS), (True, COLUMNS, ROWS)]
    for (registers, major_a, major_b), accumulate in itertools.product(variants, (True, False)):
        fresh = not accumulate and (major_a, major_b) == (COLUMNS, ROWS if registers else COLUMNS)
        a, b = small_integers(64, 128, dtype=dtype), small_integers(128, n, dtype=dtype)
        d = small_integers(64, n, dtype=torch.float32)
        expected = a.float() @ b.float() + (0 if fresh else d)
        a = a if major_a == COLUMNS else a.t().contiguous()
        b = b if major_b == ROWS else b.t().contiguous()
        run(library.test_wgmma, DTYPES[dtype], n, registers, not fresh, major_a, major_b, a, b, d)
        assert torch.equal(d, expected), (registers, major_a, major_b, fresh)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (64, 128))
def test_statistics_enter_a_product_as_floats(library: ctypes.CDLL, n: int, dtype: torch.dtype) -> None:
    statistics = torch.randn(n, 2, device="cuda") * torch.logspace(-3, 3, n, device="cuda")[:, None]
    statistics[0] = torch.tensor([-(2.0**27), 0.0])
    out = torch.full((2, 64, n), float("nan"), device="cuda")
    run(library.test_statistics, DTYPES[dtype], n, statistics, out)
    expected = statistics.t()[:, None].expand_as(out)
    # Three parts hold the 24 bits of a float. A product keeps as many of its largest summand by the operands'
    # exponents, and those of fp16's high part, which is subnormal for a small number, are 2^-14 and 2^15.
    largest = expected.double().abs() + (0 if dtype == torch.bfloat16 else 2)
    assert ((out.double() - expected.double()).abs() <= largest * 2.0**-23).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("head_dim, column", ((64, 0), (40, 0), (128, 64), (72, 64)))
def test_a_box_ends_with_its_sequence(library: ctypes.CDLL, head_dim: int, column: int) -> None:
    rows, heads, max_rows, box_rows = 300, 3, 150, 64
    for head, row, end in ((0, 0, 64), (1, 100, 164), (2, 100, 131), (1, 290, 300), (0, 0, 1), (2, 70, 200)):
        tensor = torch.randn(rows, heads, head_dim, device="cuda").bfloat16()
        target = torch.full_like(tensor, 3)
        raw = torch.zeros(box_rows, 64, device="cuda", dtype=torch.bfloat16)
        box, untouched = torch.zeros_like(raw), target.clone()
        inside, width = min(end - row, box_rows), min(head_dim - column, 64)
        box[:inside, :width] = tensor[row : row + inside, head, column : column + width]
        run(library.test_box, tensor, target, rows, heads, head_dim, max_rows, box_rows, column, row, end, head, raw)
        assert torch.equal(raw, swizzled(box))
        untouched[row : row + inside, head, column : column + width] = box[:inside, :width]
        assert torch.equal(target, untouched)


@pytest.mark.gpu
@on_hopper
def test_bulk_copies_clusters_and_sums(library: ctypes.CDLL) -> None:
    numbers = small_integers(2, 256, dtype=torch.float32)
    swapped, stored, stored_by_threads = (torch.zeros_like(numbers) for _ in range(3))
    sums = torch.ones(256, device="cuda")
    run(library.test_bulk, numbers, swapped, sums, stored, stored_by_threads)
    assert torch.equal(swapped, numbers.flip(0))
    assert torch.equal(stored, numbers)
    assert torch.equal(stored_by_threads, numbers)
    assert torch.equal(sums, 1 + 2 * numbers.sum(0))  # by both ways of adding


@pytest.mark.gpu
@on_hopper
def test_full_and_empty_barriers_lose_no_phase(library: ctypes.CDLL) -> None:
    count = 2001
    seen = torch.zeros(count, 96, dtype=torch.int32, device="cuda")
    run(library.test_ring, count, seen)
    assert torch.equal(seen, (3 * torch.arange(count, device="cuda", dtype=torch.int32) + 1)[:, None].expand_as(seen))


@pytest.mark.gpu
@on_hopper
def test_named_barriers(library: ctypes.CDLL) -> None:
    votes = torch.zeros(300, 128, dtype=torch.int32, device="cuda")
    votes[torch.arange(128), torch.arange(128)] = 1  # one voter, each in turn; then none; then all
    votes[200:] = 1
    heard, order = torch.full_like(votes, -1), torch.zeros(300, 64, dtype=torch.int32, device="cuda")
    run(library.test_votes, 300, votes, heard, order)
    assert torch.equal(heard, votes.amax(1, keepdim=True).expand_as(heard))
    assert torch.equal(order, torch.arange(1, 301, dtype=torch.int32, device="cuda")[:, None].expand_as(order))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("ctas_of_tile", (1, 2))
def test_one_tile_is_the_first_and_the_others_see_what_it_wrote(library: ctypes.CDLL, ctas_of_tile: int) -> None:
    ctas, rounds = 500, 300
    states = torch.zeros(rounds, dtype=torch.int32, device="cuda")
    values = torch.zeros(rounds, ctas_of_tile, dtype=torch.int32, device="cuda")
    seen = torch.zeros(rounds, ctas, dtype=torch.int32, device="cuda")
    run(library.test_claims, ctas_of_tile, ctas, rounds, states, values, seen)
    written = 7 * torch.arange(rounds, dtype=torch.int32, device="cuda")[:, None] + 1
    first = seen == -1
    tiles = first.view(rounds, -1, ctas_of_tile)
    assert (tiles.all(2).sum(1) == 1).all() and (tiles.any(2).sum(1) == 1).all()
    assert torch.equal(torch.where(first, written, seen), written.expand_as(seen))


@pytest.mark.gpu
@on_hopper
def test_a_dependent_launch_sees_what_the_one_before_wrote(library: ctypes.CDLL) -> None:
    for _ in range(10):
        number, out = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))
        run(library.test_dependent_launch, number, out)
        assert out.item() == 7


@pytest.mark.gpu
@on_hopper
def test_matrices_are_stored_plain_and_transposed(library: ctypes.CDLL) -> None:
    matrices = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16, device="cuda")
    plain, transposed, two = torch.zeros_like(matrices), torch.zeros_like(matrices), torch.zeros_like(matrices[:2])
    # Lane l holds row l / 4, columns 2 (l % 4) and the next.
    run(library.test_fragments, matrices, plain, transposed, two)
    assert torch.equal(plain, matrices)
    assert torch.equal(two, matrices[:2])
    assert torch.equal(transposed, matrices.transpose(1, 2))


@pytest.mark.gpu
@on_hopper
def test_arithmetic(library: ctypes.CDLL) -> None:
    special = [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        1e38,
        -1e38,
        65504.0,
        65519.0,
        65520.0,
        2.0**-24,
        2.0**-25,
        1e-40,
    ]
    ties = (1 + torch.arange(512) * 2.0**-9).tolist()  # halfway between two bfloat16
    x = torch.cat([torch.tensor(special + ties), torch.randn(1 << 18) * 40]).cuda()
    bf16, fp16 = (torch.zeros(len(x), dtype=torch.int32, device="cuda") for _ in range(2))
    powers = torch.zeros_like(x)
    run(library.test_arithmetic, len(x), x, bf16, fp16, powers)
    for dtype, packed in ((torch.bfloat16, bf16), (torch.float16, fp16)):
        pairs = torch.stack([x, x.roll(-1)], 1).to(dtype)
        assert torch.equal(packed.view(torch.int16).view(-1, 2), pairs.view(torch.int16))
    normal = (x >= -126) & (x < 128)
    exact = x[normal].double().exp2()
    assert ((powers[normal].double() - exact).abs() <= exact * 2.0**-22).all()
    assert (powers[x < -150] == 0).all()
    assert torch.equal(powers[:4], torch.tensor([1, 1, float("inf"), 0], device="cuda"))
