"""What a prepared mask says of itself: shares of classes, pictures, and what explain makes of them."""

from __future__ import annotations

import pytest
import torch

import flash_attn
from flash_attn import prepare_mask
from introspection import needs_introspection


def test_shares_are_of_scores() -> None:
    prepared = prepare_mask(torch.ones(256, 256, dtype=torch.bool).tril())
    assert prepared.shares() == (0.25, 0.25, 0.5, 0.0)
    assert prepared.visited == 0.75
    assert prepare_mask(torch.arange(384) < 192).shares() == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
        0,
    )
    bias = torch.zeros(128, 256)
    bias[:, 128:] = 2.0
    assert prepare_mask(bias).shares() == (0.0, 0.5, 0.0, 0.5)
    assert prepare_mask(torch.ones(130, 128, dtype=torch.bool)).shares() == (0, 1, 0, 0)
    with pytest.raises(ValueError, match=r"a multiple of 16, a multiple of 64\), but is \(128, 100\)"):
        prepared.shares((128, 100))


@pytest.mark.parametrize("shape", [(2, 0, 5, 5), (0, 1, 5, 5), (0,), (5, 0), (0, 5)], ids=str)
def test_of_nothing_there_is_a_picture_too(shape: tuple[int, ...]) -> None:
    prepared = prepare_mask(torch.ones(shape, dtype=torch.bool))
    assert str(prepared).startswith(f"PreparedMask({shape}, bool, cpu, ")
    assert prepared.visited == 0.0


def test_its_picture_is_text() -> None:
    prepared = prepare_mask(torch.ones(384, 384, dtype=torch.bool).tril())
    lines = prepared.picture().splitlines()
    assert lines[:3] == ["▒··", "█▒·", "██▒"]
    assert lines[3].startswith("a letter is 128 x 128; · skip 33.3%, █ full 33.3%, ▒ partial 33.3%, + biased 0.0%")
    assert prepared.picture(width=2).splitlines()[:2] == ["▒·", "█▒"]
    assert repr(prepared) == f"PreparedMask((384, 384), bool, cpu, {prepared.nbytes} bytes)"
    assert str(prepared).startswith(repr(prepared) + "\n▒··")
    per_head = prepare_mask(torch.stack([torch.zeros(128, 128), torch.full((128, 128), -torch.inf)]))
    assert per_head.picture(head=0)[0] == "█" and per_head.picture(head=1)[0] == "·"
    with pytest.raises(IndexError, match=r"head must be in \[0, 2\), but is 2"):
        per_head.picture(head=2)


def test_matplotlib_draws_it() -> None:
    pytest.importorskip("matplotlib").use("agg")
    axes = prepare_mask(torch.ones(384, 256, dtype=torch.bool).tril()).plot()
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 256), (384, 0))
    assert axes.images[0].get_array().tolist() == [[2, 0], [1, 2], [1, 1]]


@needs_introspection
def test_explain_says_what_a_mask_costs() -> None:
    q = torch.randn(1, 2, 256, 32)
    mask = torch.ones(256, 256, dtype=torch.bool).tril()
    prepared = prepare_mask(mask)
    dense, other, none = (flash_attn.explain(q, q, q, m).calls[0] for m in (mask, prepared, None))
    assert none.mask is None and dense.mask is not None and other.mask is not None
    assert dense.mask.shares == other.mask.shares == prepared.shares()
    assert (dense.mask.prepared, dense.mask.read_bytes) == (False, 256 * 256)
    assert (other.mask.prepared, other.mask.read_bytes, other.mask.packed_bytes) == (True, 0, prepared.nbytes)
    assert "mask     skip 25.0%, full 25.0%, partial 50.0%" in str(dense)
    padding = torch.ones(1, 1, 1, 256, dtype=torch.bool).expand(1, 2, 256, 256)
    use = flash_attn.explain(q, q, q, padding).calls[0].mask
    assert use is not None and use.read_bytes == 256
