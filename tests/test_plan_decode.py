"""Which problems the kernels for few query rows take, and how: without a GPU, from the introspection module."""

from __future__ import annotations

import os
from typing import Any

import pytest

from introspection import _C, CUDA_FAMILIES
from plans import BASE, CACHE_OPTIONS, H200, cache_tensor, plan, plan_cache

pytestmark = [
    pytest.mark.skipif("decode" not in CUDA_FAMILIES, reason="built without the kernels for few query rows"),
    pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced"),
]


@pytest.mark.parametrize(
    "head_dim, kernel", [(8, "d64"), (64, "d64"), (72, "d96"), (128, "d128"), (136, "d192"), (256, "d256")]
)
def test_the_smallest_kernel_that_holds_the_head_dim(head_dim: int, kernel: str) -> None:
    chosen = plan_cache(head_dim=head_dim)
    assert chosen["family"] == "decode" and chosen["kernel"].startswith(f"decode {kernel} 16x")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"rows": 17, "heads": 8}, "over 16 query rows"),
        ({"rows": 16, "heads": 64}, "over 64 query rows read the same keys"),
        ({"dtype": "float32"}, "dtype"),
        ({"head_dim": 20}, "multiple of 8"),
        ({"head_dim": 264}, "over 256"),
        ({"address": BASE + 8}, "16 bytes"),
        ({"device": (75, 40, 65536, 4 << 20)}, "older than compute capability 8.0"),
        ({"rows": 0}, "empty"),
    ],
)
def test_what_it_does_not_take(changes: dict[str, Any], reason: str) -> None:
    chosen = plan_cache(**changes)
    assert chosen["family"] != "decode"
    assert [reason in text for family, text in chosen["rejected"] if family == "decode"] == [True]


@pytest.mark.parametrize("head_dim, kernel", [(16, "d64"), (80, "d128"), (128, "d128"), (192, "d192"), (208, "d256")])
@pytest.mark.parametrize("rows", [1, 500])
def test_float8_caches_have_kernels_of_their_own(head_dim: int, kernel: str, rows: int) -> None:
    chosen = plan_cache(rows, head_dim=head_dim, stored="float8_e4m3fn")
    assert chosen["family"] == "decode" and chosen["kernel"].startswith(f"decode float8 {kernel} ")
    assert chosen["workspace_bytes"] > 0 and chosen["decisions"]["stages"] >= 2


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"device": (86, 84, 101376, 6 << 20)}, "float8 needs compute capability 8.9"),
        ({"head_dim": 72}, "head_dim is not a multiple of 16, which float8 needs"),
        ({"head_dim": 272}, "head_dim is over 256"),
        ({"dtype": "float32"}, "q must be bfloat16 or float16 with caches of float8_e4m3fn"),
        ({"address": BASE + 8}, "rows are not aligned to 16 bytes"),
    ],
)
def test_what_no_kernel_takes_of_float8(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason.replace(".", r"\.")):
        plan_cache(stored="float8_e4m3fn", **changes)


@pytest.mark.parametrize(
    "head_dim, tile", [(64, "64x128"), (80, "64x64"), (128, "64x64"), (192, "64x64"), (256, "64x64")]
)
def test_more_than_32_rows_are_a_warpgroups_on_hopper(head_dim: int, tile: str) -> None:
    assert not plan_cache(8, head_dim=head_dim)["kernel"].endswith("wgmma")
    kernel = plan_cache(9, head_dim=head_dim)["kernel"]
    assert kernel.endswith(f"{tile} wgmma")
    assert plan_cache(9, head_dim=head_dim, stored="float8_e4m3fn")["kernel"].startswith("decode float8")
    for device in ((80, 108, 166912, 40 << 20), (100, 148, 232448, 126 << 20)):
        assert not plan_cache(9, head_dim=head_dim, device=device)["kernel"].endswith("wgmma")


def _plan_latent(k_stride: int = 576, v_address: int = BASE, head_dim_v: int = 512, **more: Any) -> dict[str, Any]:
    heads, keys = more.pop("heads", 16), 4096
    caches = {
        name: (address, "bfloat16", 0, [4, keys, 1, columns], [keys * k_stride, k_stride, k_stride, 1])
        for name, address, columns in (("k_cache", BASE, 576), ("v_cache", v_address, head_dim_v))
    }
    device = more.pop("device", H200)
    result: dict[str, Any] = _C.plan_cache(
        {"q": cache_tensor("bfloat16", 4, 1, heads, 576), **caches}, CACHE_OPTIONS, device
    )
    return result


@pytest.mark.parametrize("heads", [1, 16, 128])
def test_values_that_are_a_part_of_the_keys_have_a_kernel_on_hopper(heads: int) -> None:
    chosen = _plan_latent(heads=heads)
    assert chosen["kernel"] == "decode d576 v512 64x32" and chosen["decisions"]["stages"] == 4
    assert _plan_latent(head_dim_v=448)["kernel"] == "decode d576 v512 64x32"


@pytest.mark.parametrize(
    "changes",
    [{"v_address": BASE + 128}, {"head_dim_v": 576}, {"device": (80, 108, 166912, 40 << 20)}, {"k_stride": 580}],
)
def test_others_of_so_many_columns_are_the_universal_kernels(changes: dict[str, Any]) -> None:
    assert _plan_latent(**changes)["family"] == "universal"


def test_many_rows_whose_values_are_their_keys_are_the_ordinary_kernels() -> None:
    """Self-attention of one tensor three times, of head dims that those take."""
    for head_dim in (320, 512):
        assert plan(head_dim=head_dim, device=H200)["forward"]["family"] == "sm80"


@pytest.mark.parametrize("rows", [1, 8, 9, 16])
def test_tiles_have_room_for_the_rows_that_share_keys(rows: int) -> None:
    assert plan_cache(rows)["tile"][0] == (16 if rows <= 4 else 32 if rows <= 8 else 64)


@pytest.mark.parametrize("rows", [1, 16, 17, 500])
def test_of_caches_in_pages_it_takes_any_number_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_FORCE", "decode")
    chosen = plan_cache(rows, page_size=16)
    assert chosen["family"] == "decode" and chosen["tile"][0] == (16 if rows == 1 else 64)
    assert "copied_bytes" not in chosen


def test_other_families_refuse_pages() -> None:
    chosen = plan_cache(page_size=16, dtype="float32")
    assert chosen["family"] == "universal"
    assert {family for family, text in chosen["rejected"] if text == "k and v lie in a cache"} >= {"sm80"}


def test_no_more_ctas_than_blocks_of_keys_and_as_many_as_the_gpu_holds() -> None:
    assert plan_cache(batch=1, keys=64)["decisions"]["ctas"] <= 3 * 8
    assert plan_cache(batch=67)["decisions"]["ctas"] == 2 * 132
    assert plan_cache(batch=64)["decisions"]["ctas"] == 512  # a tile each, about half of them at once
    assert plan_cache(batch=128)["decisions"]["ctas"] == 512  # two tiles each
    assert plan_cache(batch=64, keys=512)["decisions"]["ctas"] == 256  # too short to begin anew
    small = plan_cache(batch=1)["decisions"]["ctas"]  # of 8 tiles: as many CTAs for each
    assert small % 8 == 0 and small >= 0.95 * 2 * 132


@pytest.mark.parametrize(
    "changes, ctas, cluster",
    [
        ({"batch": 1, "keys": 1024}, 64, 8),
        ({"batch": 1, "keys": 2048}, 64, 8),
        ({"batch": 2, "keys": 1024}, 64, 4),  # of 16 clusters of 8 not all would run at once
        ({"batch": 8, "keys": 512}, 128, 2),
        ({"batch": 8, "keys": 1024}, 256, 1),  # so many blocks that two CTAs an SM are better
        ({"batch": 1, "keys": 4096}, 256, 1),
        ({"batch": 16, "keys": 2048, "heads_k": 1}, 128, 8),
        ({"batch": 64}, 512, 1),  # a tile each
    ],
)
def test_few_blocks_of_a_tile_are_a_clusters(changes: dict[str, Any], ctas: int, cluster: int) -> None:
    for lengths in ({}, {"cache_seqlens": cache_tensor("int32", changes["batch"])}):
        decisions = plan_cache(**changes, **lengths)["decisions"]
        assert decisions["cluster"] == cluster and (decisions["ctas"] == ctas or cluster == 1)
    assert _plan_latent()["decisions"]["cluster"] == 1


def test_decisions_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_DECODE_PLAN", "stages=3,ctas=256,cluster=2")
    assert plan_cache(batch=8, keys=1024)["decisions"] == {"ctas": 256, "stages": 3, "cluster": 2}
    monkeypatch.setenv("FLASH_ATTN_DECODE_PLAN", "cluster=4")
    assert plan_cache(batch=8, keys=1024)["decisions"] == {"ctas": 256, "stages": 2, "cluster": 4}
    monkeypatch.setenv("FLASH_ATTN_DECODE_PLAN", "tile=64,warpgroup=0")
    assert plan_cache()["kernel"] == "decode d128 64x64"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("stage=3", "'stage=3' is no decision and its number; there are: tile, warpgroup, stages, ctas, cluster"),
        ("stages=three", "'stages=three' is no decision"),
        ("stages", "'stages' is no decision"),
        ("tile=65", "'tile=65' is no decision"),
        ("stages=6", "this problem does not take stages=6, the nearest is 3"),
        ("ctas=100,cluster=4", "this problem does not take cluster=4, the nearest is 1"),
    ],
)
def test_what_cannot_be_forced_is_an_error(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_DECODE_PLAN", text)
    with pytest.raises(RuntimeError, match=reason):
        plan_cache(batch=8, keys=1024)
