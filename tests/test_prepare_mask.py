"""`prepare_mask`: the same numbers as the dense mask, in whatever it stands in for it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import flash_attn
from flash_attn import FlashMHA, flash_attn_func, prepare_mask
from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.masks import packed_mask
from flash_attn.torch_op.library import forward_op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
B, H, L, S, E = 2, 4, 150, 210, 32


def _inputs(dtype: torch.dtype, device: str, rows: int = L, columns: int = S, heads_k: int = H) -> list[Tensor]:
    shapes = ((B, H, rows, E), (B, heads_k, columns, E), (B, heads_k, columns, E))
    return [torch.randn(*shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


def _banded(*lead: int) -> Tensor:
    """Tiles of every class."""
    row, col = torch.arange(L)[:, None], torch.arange(S)
    keep = ((col - row).abs() < 40) | (col >= 150) & (row >= 100)
    return keep.expand(*lead, L, S) & (torch.rand(*lead, 1, 1) < 2)


MASKS: dict[str, Callable[[], Tensor]] = {
    "2d": lambda: _banded(),
    "per head": lambda: _banded(1, H) & (torch.rand(1, H, L, S) < 0.9),
    "per batch": lambda: _banded(B, 1) & (torch.rand(B, 1, 1, S) < 0.9),
    "padding": lambda: torch.arange(S) < torch.tensor([90, 170])[:, None, None, None],
    "rows": lambda: torch.rand(B, 1, L, 1) < 0.7,
    "full": lambda: _banded(B, H),
}


def _agree(one: list[Tensor], other: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def _run(q: Tensor, k: Tensor, v: Tensor, mask: Any, *leaves: Tensor, **options: Any) -> list[Tensor]:
    out = sdpa(q, k, v, mask, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, *leaves), weight)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_a_boolean_mask_means_the_same(kind: str, dtype: torch.dtype, device: str) -> None:
    mask = MASKS[kind]().to(device)
    inputs = _inputs(dtype, device)
    prepared = prepare_mask(mask)
    assert prepared.shape == mask.shape and prepared.dtype == torch.bool and prepared.device == mask.device
    assert torch.equal(prepared.to_dense(), mask)
    _agree(_run(*inputs, prepared), _run(*inputs, mask), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("values", ["hidden", "one cell", "everywhere"])
@pytest.mark.parametrize("mask_dtype", [torch.float32, "own"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_floating_mask_means_the_same_and_gets_its_gradient(
    dtype: torch.dtype, mask_dtype: Any, values: str, device: str
) -> None:
    bias = torch.zeros(H, L, S).masked_fill(~_banded(), -torch.inf)
    if values == "one cell":
        bias[1, 20, 30] = 1.5
    elif values == "everywhere":
        bias = bias + torch.randn(H, L, S)
    bias = bias.to(device, dtype if mask_dtype == "own" else mask_dtype).requires_grad_()
    inputs = _inputs(dtype, device)
    prepared = prepare_mask(bias)
    assert prepared.dtype == bias.dtype and (prepared.shares().biased > 0) == (values != "hidden")
    _agree(_run(*inputs, prepared, bias), _run(*inputs, bias, bias), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_every_other_option_holds_too(device: str) -> None:
    mask = MASKS["per head"]().to(device)
    inputs = _inputs(torch.float32, device, heads_k=2)
    options = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
    _agree(_run(*inputs, prepare_mask(mask), **options), _run(*inputs, mask, **options), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_flash_attn_func_takes_masks_dense_and_prepared(device: str) -> None:
    q, k, v = (x.detach().transpose(1, 2) for x in _inputs(torch.float32, device))
    mask = MASKS["per batch"]().to(device)
    expected = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
    for given in (mask, prepare_mask(mask)):
        out, lse = flash_attn_func(q, k, v, attn_mask=given, return_lse=True)
        torch.testing.assert_close(out, expected)
        assert lse.shape == (B, H, L)
    windowed = flash_attn_func(q, k, v, causal=True, window_size=(20, 0), softcap=2.0, attn_mask=prepare_mask(mask))
    dense = flash_attn_func(q, k, v, causal=True, window_size=(20, 0), softcap=2.0, attn_mask=mask)
    torch.testing.assert_close(windowed, dense)


@pytest.mark.parametrize("device", DEVICES)
def test_one_prepared_mask_serves_all_layers(device: str) -> None:
    layers = [FlashMHA(64, 4).to(device) for _ in range(2)]
    x = torch.randn(2, 90, 64, device=device)
    keep = torch.rand(2, 1, 1, 90, device=device) < 0.7
    prepared, y = prepare_mask(keep), x
    for layer in layers:
        x, y = layer(x, attn_mask=prepared), layer(y, attn_mask=keep)
    torch.testing.assert_close(x, y)


@pytest.mark.parametrize("device", DEVICES)
def test_what_no_query_of_a_tile_sees_may_be_nan(device: str) -> None:
    q, k, v = (x.detach() for x in _inputs(torch.float32, device))
    mask = (torch.arange(S) < 70).expand(L, S).contiguous().to(device)
    expected = sdpa(q, k, v, mask)
    k[:, :, 128:], v[:, :, 128:] = torch.nan, torch.nan
    assert torch.equal(sdpa(q, k, v, prepare_mask(mask)), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_what_was_expanded_costs_what_it_was_expanded_from(dtype: torch.dtype) -> None:
    keep = torch.rand(B, 1, 1, S) < 0.7
    mask = keep if dtype == torch.bool else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    prepared = prepare_mask(mask.expand(B, H, L, S))
    assert prepared.shape == (B, H, L, S) and prepared.padded_shape == mask.shape
    assert prepared.nbytes == prepare_mask(mask).nbytes
    assert torch.equal(prepared.to_dense(), mask.expand(B, H, L, S))
    inputs = _inputs(torch.float32, "cpu")
    _agree(_run(*inputs, prepared), _run(*inputs, mask), torch.float32)


def test_of_a_boolean_mask_bits_alone_are_used() -> None:
    prepared = prepare_mask(torch.ones(64, 64, dtype=torch.bool).tril())
    values, packed = prepared.for_scores(torch.zeros(1, 1, 64, 8), (1, 1, 64, 64))
    assert values.untyped_storage().nbytes() == 1
    assert packed.numel() * 8 == prepared.nbytes < 64 * 64


# -- lengths of documents


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", [[60, 1, 0, 89], [[60, 90], [149, 1, 0]], "tensor"], ids=str)
def test_lengths_are_documents_that_do_not_see_each_other(given: Any, device: str) -> None:
    rows = [[60, 1, 0, 89], [150]] if given == "tensor" else given if isinstance(given[0], list) else [given]
    lengths = torch.tensor([[60, 1, 0, 89], [150, 0, 0, 0]], device=device) if given == "tensor" else given
    prepared = prepare_mask(lengths=lengths, device=None if given == "tensor" else device)
    dense = torch.stack([torch.block_diag(*(torch.ones(n, n) for n in row if n > 0)).bool() for row in rows])[:, None]
    assert prepared.shape == dense.shape and prepared.device.type == device
    assert torch.equal(prepared.to_dense().cpu(), dense)
    inputs = _inputs(torch.float32, device, L, L)
    expected = _run(*inputs, dense.to(device), is_causal=True)
    _agree(_run(*inputs, prepared, is_causal=True), expected, torch.float32)


# -- FlexAttention's BlockMask


def _documents(device: str) -> Tensor:
    return (torch.arange(300, device=device) // 70).contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [128, 64, (128, 32)], ids=str)
@pytest.mark.parametrize("kind", ["causal", "documents", "per head", "window"])
def test_a_block_mask_means_the_same(kind: str, block: Any, device: str) -> None:
    document = _documents(device)
    mods: dict[str, Any] = {
        "causal": lambda b, h, q, k: q >= k,
        "documents": lambda b, h, q, k: (document[q] == document[k]) & (q >= k),
        "per head": lambda b, h, q, k: (q - k).abs() <= 30 * (h + 1) + b,
        "window": lambda b, h, q, k: (q - k < 100) & (q >= k),
    }
    batch, heads = (2, 3) if kind == "per head" else (None, None)
    blocks = create_block_mask(mods[kind], batch, heads, 300, 290, device=device, BLOCK_SIZE=block)
    dense = create_mask(mods[kind], batch, heads, 300, 290, device=device)
    prepared = prepare_mask(blocks)
    assert prepared.shape == dense.shape
    assert torch.equal(prepared.to_dense(), dense)


def test_a_mask_mod_is_called_for_partial_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, 1024, 1024, device="cpu")
    from flash_attn import prepare_mask as function  # the module has the same name

    globals_of: dict[str, Any] = function.__globals__
    evaluated, evaluate = [], globals_of["_evaluate"]

    def counting(mask_mod: Any, b: Tensor, *rest: Any) -> Tensor:
        evaluated.append(len(b))
        return evaluate(mask_mod, b, *rest)

    monkeypatch.setitem(globals_of, "_evaluate", counting)
    prepare_mask(blocks)
    assert sum(evaluated) == 8


# -- what is noticed and refused


def test_a_mask_changed_in_place_is_refused() -> None:
    for mask in (torch.ones(L, S, dtype=torch.bool), torch.zeros(L, S)):
        prepared = prepare_mask(mask)
        inputs = _inputs(torch.float32, "cpu")
        sdpa(*inputs, prepared)
        mask[0, 0] = 0
        with pytest.raises(RuntimeError, match=r"attn_mask must be as it was .* changed in place since: its version"):
            sdpa(*inputs, prepared)
        sdpa(*inputs, prepare_mask(mask))


def test_a_compiled_function_notices_it_too() -> None:
    mask = torch.ones(L, S, dtype=torch.bool)
    prepared = prepare_mask(mask)
    inputs = [x.detach() for x in _inputs(torch.float32, "cpu")]
    compiled = torch.compile(lambda *x: sdpa(*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, prepared), sdpa(*inputs, prepared))
    mask[0, 0] = False
    with pytest.raises(RuntimeError, match="changed in place since"):
        compiled(*inputs, prepared)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: prepare_mask(), ValueError, "one of mask and lengths must be given, but none is"),
        (lambda: prepare_mask(torch.ones(2, 2).bool(), lengths=[2]), ValueError, "both are"),
        (lambda: prepare_mask([[True]]), TypeError, "mask must be a Tensor, but is .*list"),  # type: ignore[list-item]
        (lambda: prepare_mask(torch.ones(1, 1, 1, 2, 2)), ValueError, r"one to four dimensions, .*\(1, 1, 1, 2, 2\)"),
        (lambda: prepare_mask(torch.ones(())), ValueError, r"one to four dimensions, but has shape \(\)"),
        (lambda: prepare_mask(torch.ones(2, 2).int()), RuntimeError, "but is torch.int32"),
        (lambda: prepare_mask(torch.ones(2, 2, device="meta")), RuntimeError, "on the CPU or a CUDA device, .* meta"),
        (lambda: prepare_mask(torch.ones(2, 2), device="cpu"), ValueError, "device is for lengths"),
        (lambda: prepare_mask(lengths=[3, -1]), ValueError, r"must not be negative.*\[\[3, -1\]\]"),
        (lambda: prepare_mask(lengths=[[3], [4]]), ValueError, r"the same sum.*\[\[3\], \[4\]\]"),
        (lambda: prepare_mask(lengths=[]), ValueError, r"lengths must be \(documents\)"),
        (lambda: prepare_mask(lengths=torch.ones(2)), TypeError, "lengths must be integers, but are torch.float32"),
        (lambda: prepare_mask(lengths=[1.5]), TypeError, "lengths must be an int, but is 1.5"),  # type: ignore[list-item]
    ],
)
def test_what_can_not_be_prepared_is_named(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_a_prepared_mask_has_to_fit() -> None:
    q, k, v = _inputs(torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=r"attn_mask must broadcast to \(2, 4, 150, 210\), but has shape"):
        sdpa(q, k, v, prepare_mask(torch.ones(L, S - 1).bool()))
    with pytest.raises(RuntimeError, match=r"query's dtype .*bfloat16.*, but was prepared from torch.float16"):
        sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), prepare_mask(torch.zeros(L, S).half()))
    with pytest.raises(RuntimeError, match="is for inputs of four dimensions"):
        sdpa(q[0], k[0], v[0], prepare_mask(torch.ones(H, L, S).bool()))
    torch.testing.assert_close(sdpa(q[0], k[0], v[0], prepare_mask(_banded())), sdpa(q[0], k[0], v[0], _banded()))
    mha = FlashMHA(16, 2)
    with pytest.raises(ValueError, match="key_padding_mask must be None when attn_mask is prepared"):
        mha(
            torch.randn(1, 5, 16),
            attn_mask=prepare_mask(torch.ones(5, 5).bool()),
            key_padding_mask=torch.ones(1, 5).bool(),
        )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attn_mask": None}, "attn_mask must be given with packed_mask"),
        ({"packed_mask": torch.zeros(32, dtype=torch.int64)}, r"packed_mask must have shape \(words"),
        ({"packed_mask": torch.zeros(128, dtype=torch.int32)}, "packed_mask must be int64, but is int32"),
    ],
)
def test_the_op_refuses_what_was_packed_of_another_mask(changes: dict[str, Any], text: str) -> None:
    from flash_attn.torch_op import attention as ops

    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    q = torch.randn(1, 20, 2, 8)
    with pytest.raises(RuntimeError, match=text):
        ops.attention(q, q, q, **({"attn_mask": mask, "packed_mask": packed_mask.pack(mask)} | changes))


# -- transforms, compilation, graphs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trains", [False, True])
def test_it_compiles_in_one_graph(trains: bool, device: str) -> None:
    bias = torch.randn(H, L, S, device=device, requires_grad=trains)
    prepared = prepare_mask(bias)
    inputs = [x if trains else x.detach() for x in _inputs(torch.float32, device)]
    compiled = torch.compile(lambda *x: sdpa(*x), fullgraph=True, backend="aot_eager")
    out = compiled(*inputs, prepared)
    torch.testing.assert_close(out, sdpa(*inputs, prepared))
    if trains:
        got = torch.autograd.grad(out.square().sum(), (*inputs, bias))
        expected = torch.autograd.grad(sdpa(*inputs, prepared).square().sum(), (*inputs, bias))
        _agree(list(got), list(expected), torch.float32)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_function_may_close_over_it(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    mask = prepare_mask(_banded())
    compiled = torch.compile(lambda *x: sdpa(*x, mask), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = _inputs(torch.float32, "cpu")
    torch.testing.assert_close(compiled(*inputs), sdpa(*inputs, mask))
    with pytest.raises(Exception, match="attn_mask must broadcast to"):
        compiled(inputs[0], inputs[1][:, :, 1:], inputs[2][:, :, 1:])


def test_the_op_keeps_torchs_rules() -> None:
    from flash_attn.torch_op.arguments import Options, Tensors

    q = torch.randn(1, 2, 20, 8, requires_grad=True)
    mask = torch.rand(1, 1, 20, 20) < 0.7
    tensors = Tensors(q, q, q, mask, None, None, packed_mask.pack(mask), None, None, None, None, None)
    options = Options(20, 20, None, 0, -1, -1, 0.0, 0.0, True, False)
    torch.library.opcheck(forward_op, (*tensors, *options))


@pytest.mark.parametrize("lead", [(), (1, H)], ids=str)
def test_vmap_shares_it_or_goes_one_by_one(lead: tuple[int, ...]) -> None:
    mask = _banded(*lead) & (torch.rand(*lead, L, S) < 0.9)
    prepared = prepare_mask(mask)
    q, k, v = (
        torch.stack([x.detach()] * 2) * torch.tensor([1.0, 2.0])[:, None, None, None, None]
        for x in _inputs(torch.float32, "cpu")
    )
    out = torch.func.vmap(lambda *x: sdpa(*x, prepared))(q, k, v)
    torch.testing.assert_close(out, torch.stack([sdpa(q[i], k[i], v[i], mask) for i in range(2)]))
    per_batch = prepare_mask(mask.expand(B, H, L, S).contiguous())
    torch.testing.assert_close(torch.func.vmap(lambda *x: sdpa(*x, per_batch))(q, k, v), out)


def test_autocast_leaves_a_prepared_mask_as_it_is() -> None:
    q, k, v = (x.detach() for x in _inputs(torch.float32, "cpu"))
    bias = torch.randn(L, S)
    with torch.autocast("cpu", torch.bfloat16):
        out = sdpa(q, k, v, prepare_mask(bias))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias))


@pytest.mark.gpu
def test_cuda_graphs_replay_with_a_prepared_mask() -> None:
    q, k, v = (x.detach() for x in _inputs(torch.bfloat16, "cuda"))
    mask = MASKS["per head"]().cuda()
    prepared = prepare_mask(mask)
    expected = sdpa(q, k, v, prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sdpa(q, k, v, prepared)
        made_inside = sdpa(q, k, v, prepare_mask(mask))
    graph.replay()
    assert torch.equal(out, expected) and torch.equal(made_inside, expected)


def test_copies_and_pickles_serve_too() -> None:
    inputs = [x.detach() for x in _inputs(torch.float32, "cpu")]
    for mask in (_banded(), torch.randn(L, S)):
        prepared = prepare_mask(mask)
        for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
            assert torch.equal(sdpa(*inputs, other), sdpa(*inputs, prepared))


def test_where_torchs_own_function_runs_it_gets_a_dense_mask() -> None:
    inputs = [x.detach() for x in _inputs(torch.float32, "cpu")]
    mask = _banded()
    mask[0] = True
    kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with flash_attn.replace_sdpa(), kernels:
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, prepare_mask(mask))  # type: ignore[arg-type]
    torch.testing.assert_close(out, sdpa(*inputs, mask))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "shape", [(1, 1, 128, 128), (B, 1, 70, 200), (1, H, 300, 17), (B, H, 129, 257), (B, 1, 1, 300), (1, 1, 150, 1)]
)
def test_a_small_mask_that_is_read_as_it_lies_means_the_same(shape: tuple[int, ...], head_dim: int) -> None:
    """Hopper's backward pass does not pack a small boolean mask."""
    rows, columns = (n if n > 1 else 200 for n in shape[2:])
    sizes = ((B, rows, H, head_dim), (B, columns, H, head_dim), (B, columns, H, head_dim))
    leaves = [torch.randn(*size, dtype=torch.bfloat16, device="cuda").requires_grad_() for size in sizes]
    dout = torch.randn(*sizes[0], dtype=torch.bfloat16, device="cuda")
    whole = torch.rand(shape, device="cuda") < 0.5
    whole[..., 64:, :128] = True  # blocks that hide nothing, and, but of a row that is all there is, some that hide all
    whole[..., :, 128:] &= shape[2] == 1
    for mask in (whole, whole[..., 1:] if shape[3] > 1 else whole):
        keys = [x[:, : mask.shape[3]] if mask.shape[3] > 1 else x for x in leaves[1:]]
        results = []
        for given in (mask, prepare_mask(mask)):
            out = flash_attn_func(leaves[0], *keys, attn_mask=given, deterministic=True)
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
        _agree(*results, torch.bfloat16)
