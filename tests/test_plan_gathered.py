"""When rows of a cache are copied for the kernels for long queries: without a GPU, from the introspection module."""

from __future__ import annotations

import os
from typing import Any

import pytest

from introspection import needs_kernels
from plans import cache_tensor, plan_cache

pytestmark = [
    needs_kernels("sm90"),
    pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced"),
]


def _bytes(rows: int = 4 * 4096, heads: int = 8, columns: int = 256) -> int:
    return rows * heads * columns * 2 + 256


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_many_rows_over_pages_are_copied(page_size: int) -> None:
    chosen = plan_cache(512, page_size=page_size)
    assert chosen["family"] == "sm90" and chosen["copied_bytes"] == _bytes()
    assert chosen["rejected"] == [("decode", "there are over 16 query rows")]


@pytest.mark.parametrize("name", ["cache_batch_idx", "cache_leftpad"])
def test_many_rows_over_entries_by_an_index_and_with_left_padding_are_copied(name: str) -> None:
    chosen = plan_cache(512, **{name: cache_tensor("int32", 4)})
    assert chosen["family"] == "sm90" and chosen["copied_bytes"] == _bytes()


def test_whole_caches_are_not() -> None:
    chosen = plan_cache(512)
    assert chosen["family"] == "sm90" and "copied_bytes" not in chosen


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 1},
        {"rows": 16},
        {"rows": 64, "heads": 8},
        {"rows": 512, "dtype": "float32"},
        {"rows": 512, "stored": "float8_e4m3fn"},
        {"rows": 0},
        {"rows": 512, "options": {"window_left": 10, "window_right": 0}},  # of many keys few are seen
    ],
    ids=str,
)
def test_where_it_does_not_pay_they_are_read_as_they_lie(changes: dict[str, Any]) -> None:
    changes = {"page_size": 16} | changes
    assert "copied_bytes" not in plan_cache(changes.pop("rows"), **changes)


def test_copies_are_no_larger_than_the_cache() -> None:
    """Sequences whose tables name more pages than there are share some, or have little of them."""
    for pages, family in ((1024, "sm90"), (1023, "decode")):
        caches = {name: cache_tensor("bfloat16", pages, 16, 8, 128) for name in ("k_cache", "v_cache")}
        assert plan_cache(512, page_size=16, **caches)["family"] == family


@pytest.mark.parametrize("family", ["sm90", "sm80"])
def test_a_forced_family_gets_copies_of_any_number_of_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_FORCE", family)
    for rows in (1, 512):
        chosen = plan_cache(rows, page_size=16)
        assert chosen["family"] == family and chosen["copied_bytes"] == _bytes()


@pytest.mark.parametrize("head_dim", [20, 264, 512])
def test_head_dims_that_no_kernel_reads_from_a_cache_are_copied_for_those_that_read_rows(head_dim: int) -> None:
    chosen = plan_cache(128, head_dim=head_dim, page_size=16)
    assert chosen["family"] == "sm80" and chosen["copied_bytes"] >= _bytes(columns=2 * head_dim)
    assert plan_cache(4, head_dim=head_dim, page_size=16)["family"] == "universal"


def test_values_that_are_a_part_of_the_keys_are_read_where_they_lie() -> None:
    part = {name: cache_tensor("bfloat16", 1024, 16, 1, 512) for name in ("k_cache", "v_cache")}
    assert plan_cache(512, heads_k=1, heads=16, head_dim=512, page_size=16, **part)["family"] == "decode"


@pytest.mark.parametrize("rows, family", [(32 * 512, "sm90"), (512 + 31, "decode")])
def test_one_long_sequence_among_many_of_one_row_does_not_have_all_copied(rows: int, family: str) -> None:
    packed = {"q": cache_tensor("bfloat16", rows, 32, 128), "cu_seqlens_q": cache_tensor("int32", 33)}
    chosen = plan_cache(1, batch=32, page_size=16, options={"max_seqlen_q": 512}, **packed)
    assert chosen["family"] == family


@pytest.mark.parametrize(
    "rows, changes, family",
    [  # on both sides of where it pays, by page 119 of benchmarks/experiments
        (64, {}, "decode"),
        (128, {}, "sm90"),
        (128, {"heads_k": 32}, "decode"),
        (512, {"heads_k": 32}, "sm90"),
        (17, {"heads_k": 1}, "decode"),
        (128, {"heads_k": 1}, "sm90"),
        (512, {"options": {"window_left": 1024, "window_right": 0}, "keys": 8192}, "sm90"),
    ],
    ids=str,
)
def test_who_takes_how_many_rows(rows: int, changes: dict[str, Any], family: str) -> None:
    assert plan_cache(rows, page_size=64, **changes)["family"] == family
