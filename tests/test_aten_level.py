"""`replace_sdpa(level="aten")`: our kernels under torch's own ops, against float64, and torch's afterwards."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import replace_sdpa
from flash_attn import scaled_dot_product_attention as ours
from flash_attn.sdpa import aten
from problems import CutGradient

imported_by_name = F.scaled_dot_product_attention

FLASH, EFFICIENT, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
gpu = pytest.mark.gpu
PLACES = [
    pytest.param("cpu", FLASH, id="cpu"),
    *(pytest.param("cuda", backend, marks=gpu, id=backend.name) for backend in (FLASH, EFFICIENT, CUDNN)),
]
MASKED = [place for place in PLACES if place.values[1] is not FLASH or place.values[0] == "cpu"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert aten._needed == 0


def _leaves(device: str, rows: int = 45, keys: int = 61, heads: int = 4, heads_k: int = 4) -> list[Tensor]:
    dtype = torch.float32 if device == "cpu" else torch.float16
    shapes = (2, heads, rows, 32), (2, heads_k, keys, 32), (2, heads_k, keys, 32)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def _with_gradients(function: Callable[..., Tensor], leaves: list[Tensor], **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    out = function(*leaves, **options)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    wanted = [*leaves, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
    return [out, *torch.autograd.grad(out, wanted, weight)]


def _check(device: str, backend: SDPBackend, leaves: list[Tensor], **options: Any) -> None:
    with sdpa_kernel(backend), replace_sdpa(level="aten"):
        results = _with_gradients(F.scaled_dot_product_attention, leaves, **options)
    double = {
        n: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()
    }
    if "attn_mask" in options and options["attn_mask"].requires_grad:
        double["attn_mask"].requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        reference = [x.detach().double().requires_grad_() for x in leaves]
        expected = _with_gradients(F.scaled_dot_product_attention, reference, **double)
    tolerance = 2e-5 if device == "cpu" else 2e-2
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)
    if "attn_mask" not in options:  # torch copies it to rows of another length, which other loads read
        assert torch.equal(results[0], ours(*leaves, **options))  # no torch kernel gives the same bits


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_results_are_ours(device: str, backend: SDPBackend, is_causal: bool) -> None:
    _check(device, backend, _leaves(device, 61 if is_causal else 45), is_causal=is_causal, scale=0.3)


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_that_is_none_has_none(device: str, backend: SDPBackend, masked: bool) -> None:
    if masked and backend is FLASH and device == "cuda":
        pytest.skip("takes no mask")
    leaves = _leaves(device)
    mask = torch.zeros(45, 61, device=device, dtype=leaves[0].dtype) if masked else None
    with sdpa_kernel(backend), replace_sdpa(level="aten"):
        out = F.scaled_dot_product_attention(*leaves, mask)
        CutGradient.apply(out).sum().backward()
    assert all(x.grad is None for x in leaves)


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_memory_orders(device: str, backend: SDPBackend) -> None:
    base = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in _leaves(device)]
    by_rows = [x.transpose(1, 2) for x in base]
    _check(device, backend, by_rows)


@pytest.mark.parametrize(("device", "backend"), MASKED)
@pytest.mark.parametrize("shape", [(45, 61), (2, 1, 1, 61), (2, 4, 45, 61)])
@pytest.mark.parametrize("boolean", [False, True])
def test_masks(device: str, backend: SDPBackend, shape: tuple[int, ...], boolean: bool) -> None:
    leaves = _leaves(device)
    mask = torch.randn(shape, device=device, dtype=leaves[0].dtype)
    _check(device, backend, leaves, attn_mask=mask > -1 if boolean else mask)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [61, 64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_a_mask_has_a_gradient(keys: int, shape: tuple[int, int]) -> None:
    leaves = _leaves("cuda", keys=keys)
    mask = torch.randn(*shape, 45, keys, device="cuda", dtype=torch.float16, requires_grad=True)
    _check("cuda", EFFICIENT, leaves, attn_mask=mask)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [FLASH, EFFICIENT, CUDNN])
def test_dropout_is_drawn_from_torchs_generator(backend: SDPBackend) -> None:
    leaves = _leaves("cuda", 256, 256)
    with sdpa_kernel(backend), replace_sdpa(level="aten"):
        results = _with_gradients(F.scaled_dot_product_attention, leaves, dropout_p=0.4)
        again = _with_gradients(F.scaled_dot_product_attention, leaves, dropout_p=0.4)
    expected = _with_gradients(ours, leaves, dropout_p=0.4)
    plain = _with_gradients(ours, leaves)
    assert torch.equal(results[0], expected[0])
    assert not torch.equal(results[0], plain[0])
    for result, repeated, exact in zip(results, again, expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-2, atol=1e-2)  # in whatever order gradients are added up
        torch.testing.assert_close(repeated, exact, rtol=1e-2, atol=1e-2)


def test_torch_can_be_asked_whether_gradients_are_to_repeat() -> None:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert hasattr(library, "_ZN2at13globalContextEv")
    assert hasattr(library, "_ZNK2at7Context23deterministicAlgorithmsEv")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [FLASH, EFFICIENT])  # torch does not choose cuDNN then
def test_gradients_repeat_where_torch_is_to_be_deterministic(backend: SDPBackend) -> None:
    leaves = [torch.randn(2, 4, 1024, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(backend), replace_sdpa(level="aten"):
            first, *others = (_with_gradients(F.scaled_dot_product_attention, leaves) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(before)
    for again in others:
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
def test_heads_may_share_keys() -> None:
    leaves = _leaves("cuda", heads_k=2)
    _check("cuda", FLASH, leaves, enable_gqa=True)


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_lse_is_that_of_torch(device: str, backend: SDPBackend) -> None:
    q, k, v = (x.detach() for x in _leaves(device))
    ops = torch.ops.aten

    def lse() -> Tensor:
        if device == "cpu":
            return ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)[1]
        if backend is FLASH:
            return ops._scaled_dot_product_flash_attention(q, k, v)[1]
        if backend is EFFICIENT:
            return ops._scaled_dot_product_efficient_attention(q, k, v, None, True)[1]
        return ops._scaled_dot_product_cudnn_attention(q, k, v, None, True)[1]

    torchs = lse()
    with replace_sdpa(level="aten"):
        result = lse()
    assert result.shape == torchs.shape
    assert result.stride() == torchs.stride()
    narrow = (slice(None), slice(None), slice(q.shape[2]))
    torch.testing.assert_close(result[narrow], torchs[narrow], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_compiled_code_goes_both_ways(device: str, backend: SDPBackend) -> None:
    leaves = _leaves(device, 300, 700)  # of few keys torch's sums may have the same bits
    torch._dynamo.reset()

    def attend(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*inputs)

    compiled = torch.compile(attend, fullgraph=True)
    # The key of torch's cache of compiled graphs knows the function alone, not which kernels sdpa_kernel allows.
    with sdpa_kernel(backend), torch.compiler.config.patch(force_disable_caches=True):
        torchs = _with_gradients(attend, leaves)
        with replace_sdpa(level="aten"):
            eager = _with_gradients(attend, leaves)
            out, *gradients = _with_gradients(compiled, leaves)
        assert torch.equal(out, eager[0])
        torch.testing.assert_close(gradients, eager[1:], rtol=1e-2, atol=1e-2)  # in whatever order added up
        assert not torch.equal(eager[0], torchs[0])
        assert torch.equal(compiled(*leaves), torchs[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_it_reaches_the_function_imported_by_name_and_modules(device: str) -> None:
    q, k, v = (x.detach() for x in _leaves(device, 700, 700))
    layer = nn.MultiheadAttention(32, 2, batch_first=True, device=device, dtype=q.dtype)
    x = q[:, 0]

    def results() -> tuple[Tensor, Tensor]:
        return imported_by_name(q, k, v, is_causal=True), layer(x, x, x, need_weights=False)[0]

    torchs = results()
    with replace_sdpa(level="aten"):
        of_aten = results()
    assert torch.equal(of_aten[0], ours(q, k, v, is_causal=True))
    for result, before, after in zip(of_aten, torchs, results(), strict=True):
        assert not torch.equal(result, before)
        torch.testing.assert_close(result, before, rtol=1e-2, atol=1e-2)
        assert torch.equal(before, after)


def test_it_holds_as_long_as_anyone_needs_it() -> None:
    q, k, v = (x.detach() for x in _leaves("cpu"))
    expected = ours(q, k, v)

    def ours_runs() -> bool:
        return torch.equal(F.scaled_dot_product_attention(q, k, v), expected)

    first, second = replace_sdpa(level="aten"), replace_sdpa(level="aten")
    assert ours_runs()
    first.restore()
    first.restore()
    assert ours_runs()
    with contextlib.suppress(KeyError), second:
        assert ours_runs()
        raise KeyError
    assert not ours_runs()
    with first:
        assert ours_runs()
        with first:
            assert ours_runs()
        assert ours_runs()
    assert not ours_runs()
    with replace_sdpa(level="aten") as again, again:
        again.restore()
        assert not ours_runs()
    assert not ours_runs()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="level must be 'function' or 'aten', but is 'op'"):
        replace_sdpa(level="op")  # type: ignore[arg-type]
    schemas = {"CPU": {"_scaled_dot_product_flash_attention_for_cpu": "(Tensor query) -> Tensor"}, "CUDA": {}}
    with (
        mock.patch.object(aten, "_SCHEMAS", schemas),
        pytest.raises(NotImplementedError, match="whose aten::_scaled_dot_product_flash_attention_for_cpu has other"),
    ):
        replace_sdpa(level="aten")
    q, k, v = _leaves("cpu")
    with replace_sdpa(level="aten"):
        out = F.scaled_dot_product_attention(q, k, v)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            dq.sum().backward()
