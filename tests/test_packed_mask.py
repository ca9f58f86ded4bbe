"""A packed mask's parts against their definition in csrc/packed_mask.h, score by score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn.masks import packed_mask
from flash_attn.masks.packed_mask import BIASED, HIDDEN, SEEN

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bool, torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 256, 512),
    (1, 2, 40, 300),
    (2, 1, 1, 256),  # padding
    (2, 1, 1, 700),
    (2, 3, 130, 1),
    (1, 1, 129, 64),  # the last rows' cell has one row, their group too
    (1, 1, 17, 17),
    (1, 1, 1, 1),
    (2, 2, 16, 256),
]


def _values(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    """Hidden and seen in runs, so that there are cells of each class; then what is added."""
    hidden = torch.rand(*shape[:2], -(-shape[2] // 32), -(-shape[3] // 64)) < 0.5
    hidden = hidden.repeat_interleave(32, 2).repeat_interleave(64, 3)[:, :, : shape[2], : shape[3]]
    if kind != "runs":
        hidden = hidden & (torch.rand(shape) < 0.7)
    values = torch.zeros(shape).masked_fill(hidden, -torch.inf)
    if kind == "biased" and dtype != torch.bool:
        values = torch.where(torch.rand(shape) < 0.01, torch.randn(shape), values)
        values = torch.where(torch.rand(shape) < 0.005, torch.nan, values)
        values = torch.where(torch.rand(shape) < 0.1, -values, values)  # -0.0, and +inf where something was hidden
    return values == 0 if dtype == torch.bool else values.to(dtype)


def _expected_classes(values: Tensor) -> Tensor:
    seen = values if values.dtype == torch.bool else values != -torch.inf
    biased = torch.zeros_like(seen) if values.dtype == torch.bool else seen & (values != 0)
    pad = (0, -values.shape[3] % 64, 0, -values.shape[2] % 16)

    def any_of(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, pad)
        return x.unflatten(3, (-1, 64)).unflatten(2, (-1, 16)).any(5).any(3)

    return any_of(seen) * SEEN + any_of(~seen) * HIDDEN + any_of(biased) * BIASED


def _as_it_lies(values: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "unaligned":
        wide = values.new_zeros(*values.shape[:3], values.shape[3] + 3)
        wide[..., 1:-2] = values
        return wide[..., 1:-2]
    return values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "unaligned", "transposed"])
@pytest.mark.parametrize("kind", ["runs", "mixed", "biased"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_score_has_its_bit_and_every_cell_its_class(
    dtype: torch.dtype, kind: str, layout: str, device: str
) -> None:
    for shape in SHAPES:
        values = _as_it_lies(_values(shape, dtype, kind), layout)
        packed = packed_mask.pack(values.to(device) if layout == "contiguous" else _moved(values, device)).cpu()
        assert packed.shape == (packed_mask.num_words(shape),)
        seen = values if dtype == torch.bool else values != -torch.inf
        assert torch.equal(packed_mask.unpack(packed, shape), seen), shape
        classes = packed_mask.cell_classes(packed, shape)
        assert torch.equal(classes[:, :, : -(-shape[2] // 16)], _expected_classes(values).to(torch.uint8)), shape
        columns = torch.nn.functional.pad(seen, (0, -shape[3] % 64, 0, -shape[2] % 16))
        columns = columns.unflatten(3, (-1, 64)).unflatten(2, (-1, 16)).any(3)
        if shape[3] > 1:
            expected = (columns.long() << torch.arange(64)).sum(-1)
            assert torch.equal(packed_mask.parts(packed, shape).seen, expected), shape


def _moved(values: Tensor, device: str) -> Tensor:
    """With the same strides."""
    whole = torch.empty(0, dtype=values.dtype).set_(values.untyped_storage()).to(device)
    return whole.as_strided(values.shape, values.stride(), values.storage_offset())


@pytest.mark.parametrize("device", DEVICES)
def test_a_broadcast_row_or_column_stands_for_all(device: str) -> None:
    keep = (torch.rand(1, 1, 1, 200) < 0.5).to(device)
    parts = packed_mask.parts(packed_mask.pack(keep), keep.shape)
    rows = keep.expand(1, 1, 128, 200)
    whole = packed_mask.parts(packed_mask.pack(rows.contiguous()), rows.shape)
    assert torch.equal(parts.classes, whole.classes)
    assert torch.equal(parts.bits, whole.bits[:, :, :1])
    column = (torch.rand(1, 1, 100, 1) < 0.5).to(device)
    parts = packed_mask.parts(packed_mask.pack(column), column.shape)
    whole = packed_mask.parts(packed_mask.pack(column.expand(1, 1, 100, 64).contiguous()), (1, 1, 100, 64))
    assert all(torch.equal(x, y) for x, y in zip(parts, whole, strict=True))


@pytest.mark.parametrize("rows", [1, 128, 129, 257, 300, 385])
def test_a_mask_packed_by_rows_is_the_same(rows: int) -> None:
    keep = torch.rand(2, 1, rows, 150) < 0.5
    made = []

    def rows_of(first: int, end: int) -> Tensor:
        made.append(end - first)
        return keep[:, :, first:end]

    packed = packed_mask.pack_by_rows(keep.shape, torch.device("cpu"), rows_of, bytes_at_once=1)
    assert sum(made) == rows and max(made) <= 129
    expected = packed_mask.parts(packed_mask.pack(keep), keep.shape)
    assert all(torch.equal(x, y) for x, y in zip(packed_mask.parts(packed, keep.shape), expected, strict=True))


def test_tiles_join_the_classes_of_their_cells() -> None:
    keep = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    tiles = packed_mask.tile_classes(packed_mask.pack(keep), keep.shape, (128, 128))
    assert tiles.tolist() == [[[[SEEN | HIDDEN, HIDDEN], [SEEN, SEEN | HIDDEN]]]]
    assert packed_mask.tile_classes(packed_mask.pack(keep), keep.shape, (16, 64)).shape == (1, 1, 16, 4)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(3, 4, dtype=torch.bool), r"mask must be \(batch \| 1, .*, but has shape \(3, 4\)"),
        (torch.ones(1, 1, 3, 4, dtype=torch.int32), "mask must be bool, .* but is int32"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Tensor, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        packed_mask.pack(mask)


@pytest.mark.parametrize("device", DEVICES)
def test_the_ops_keep_torchs_rules(device: str) -> None:
    mask = (torch.rand(1, 2, 512, 256) < 0.5).to(device)  # of parts without a gap in between, which nobody fills
    torch.library.opcheck(torch.ops.flash_attn.pack_mask.default, (mask,))
