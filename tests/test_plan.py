"""Which kernel the dispatcher and the planners choose."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from introspection import _C, needs_kernels
from plans import A100, plan
from problems import HOPPER_FORWARD, forward_head_dims

pytestmark = [
    needs_kernels("universal"),
    pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced"),
]
needs_sm90 = needs_kernels("sm90")


def backward_decisions(*problem: int, **changes: Any) -> dict[str, int | str]:
    return plan(*problem, **changes)["backward"]["decisions"]


def test_a_gpu_that_is_no_hopper_gets_the_kernels_for_all_since_ampere() -> None:
    if "80" not in _C.build_info()["cuda_archs"]:
        pytest.skip("built without code for compute capability 8.0")
    plans = plan(device=A100)
    for choice in plans.values():
        assert choice["family"] == "sm80"
    assert all("compute capability" in reason for family, reason in plans["forward"]["rejected"] if family == "sm90")


@needs_sm90
@pytest.mark.parametrize(
    "head_dim, head_dim_v, forward, backward",
    [
        (8, 8, "d64 ", "d64 "),
        (64, 64, "d64 ", "d64 "),
        (72, 72, "d96 ", "d96 "),
        (96, 96, "d96 ", "d96 "),
        (104, 104, "d128 ", "d128 "),
        (128, 128, "d128 ", "d128 "),
        (96, 128, "d128 ", "d128 "),
        (192, 128, "d192/128 ", "d192 v128 "),
        (192, 192, "d192 ", "d192 "),
        (256, 128, "d256/128 ", "d256 "),
        (256, 256, "d256 ", "d256 "),
    ],
)
def test_the_smallest_kernel_that_holds_the_head_dims(
    head_dim: int, head_dim_v: int, forward: str, backward: str
) -> None:
    plans = plan(head_dim=head_dim, head_dim_v=head_dim_v)
    assert plans["forward"]["kernel"].startswith(f"wgmma {forward}")
    assert plans["backward"]["kernel"].startswith(f"wgmma {backward}")


@needs_sm90
@pytest.mark.parametrize(
    "changes, reason, family",
    [
        ({"dtype": "float64"}, "dtype", "universal"),
        ({"head_dim": 264}, "over 256", "sm80"),
        ({"head_dim": 520}, "over 256", "universal"),
        ({"head_dim": 20}, "multiple of 8", "sm80"),
        ({"address": (1 << 20) + 2}, "16 bytes", "sm80"),
    ],
)
def test_what_the_hopper_kernels_refuse_the_next_family_takes(
    changes: dict[str, Any], reason: str, family: str
) -> None:
    for choice in plan(**changes).values():
        assert choice["family"] == family
        assert [reason in text for name, text in choice["rejected"] if name == "sm90"] == [True]


@needs_sm90
@pytest.mark.parametrize("options", [{"causal": 1}, {"causal": 2}, {"window_left": 100}, {"window_right": 7}])
def test_causal_attention_and_windows_get_kernels_that_mask(options: dict[str, int]) -> None:
    assert not plan()["forward"]["kernel"].endswith("masked")
    assert plan(**options)["forward"]["kernel"].endswith("masked")


@needs_sm90
@pytest.mark.parametrize("name", HOPPER_FORWARD)
def test_a_forward_kernel_can_be_asked_for_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_FORWARD_KERNEL", name)
    head_dim, head_dim_v = forward_head_dims(name)
    for causal, ending in ((0, ""), (1, " masked")):
        chosen = plan(head_dim=head_dim, head_dim_v=head_dim_v, causal=causal)["forward"]
        assert chosen["kernel"] == f"wgmma {name}{ending}"
    with pytest.raises(RuntimeError, match=f"FLASH_ATTN_FORWARD_KERNEL={name} takes no problem.*wgmma d"):
        plan(head_dim=8 if head_dim > 64 else 128)


@needs_sm90
def test_keys_are_shared_out_when_there_are_few_tiles() -> None:
    few = plan(batch=1, heads=70, seqlen_q=128, seqlen_k=65536)["forward"]
    assert few["decisions"]["key_splits"] >= 2
    assert few["workspace_bytes"] >= 2 * 128 * 128 * 4, "two parts' float32 results at least"
    whole_waves = plan(batch=1, heads=132, seqlen_q=few["tile"][0])["forward"]
    assert whole_waves["decisions"]["key_splits"] == 1
    assert whole_waves["workspace_bytes"] == 0


@needs_sm90
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tiles", [1, 10, 16, 32, 66])
def test_a_cluster_shares_out_the_keys_of_each_of_few_tiles(tiles: int, head_dim: int) -> None:
    for causal in (0, 2):
        few = plan(batch=1, heads=tiles, seqlen_q=128, seqlen_k=4096, head_dim=head_dim, causal=causal)["forward"]
        parts, ctas = few["decisions"]["key_splits"], few["decisions"]["ctas"]
        assert "cluster" in few["kernel"] and 2 <= parts <= 8
        assert ctas == tiles * parts <= 132, "all run at once"
        assert few["workspace_bytes"] == 0
    one_block = plan(batch=1, heads=tiles, seqlen_q=128, seqlen_k=64, head_dim=head_dim)["forward"]
    assert "cluster" not in one_block["kernel"]


@needs_sm90
def test_workspace_is_linear_in_the_sequence() -> None:
    for changes in ({}, {"causal": 1}, {"heads_k": 1}, {"deterministic": True}, {"head_dim": 256}):
        for once, twice in zip(plan(**changes).values(), plan(seqlen_q=8192, **changes).values(), strict=True):
            assert twice["workspace_bytes"] <= 2 * max(once["workspace_bytes"], 16 << 20)


@needs_sm90
def test_backward_needs_dq_in_float32_and_two_floats_a_row() -> None:
    rows, padded = 4 * 16 * 4096, 128
    bytes_a_row = 4 / 128 + 8 / 64  # a flag for each tile, two numbers for each query block
    for causal in (0, 1):
        assert plan(causal=causal)["backward"]["workspace_bytes"] <= rows * (padded * 4 + 16 + bytes_a_row) + 4096


@needs_sm90
@pytest.mark.parametrize("head_dim, deterministic", [(64, False), (64, True), (96, False), (128, False)])
@pytest.mark.parametrize("causal", [0, 1])
def test_backward_writes_dq_itself_when_ctas_take_many_tiles(head_dim: int, deterministic: bool, causal: int) -> None:
    for batch, writes in ((1, 0), (16, 1)):
        decisions = backward_decisions(
            batch=batch, seqlen_q=1024, head_dim=head_dim, causal=causal, deterministic=deterministic
        )
        assert decisions["dq_writing"] == writes


@needs_sm90
@pytest.mark.parametrize(
    "changes, dq",
    [
        ({}, "first stores"),
        ({"head_dim": 256}, "first stores"),
        ({"head_dim": 64}, "added to zeros"),
        ({"head_dim": 64, "causal": 1, "seqlen_q": 1024}, "first stores"),
        ({"batch": 64, "seqlen_q": 128, "head_dim": 64}, "of one CTA"),
        ({"deterministic": True}, "in a fixed order"),
        ({"head_dim": 64, "deterministic": True}, "in a fixed order"),
        ({"head_dim": 256, "deterministic": True}, "in a fixed order"),
    ],
)
def test_how_tiles_add_up_dq(changes: dict[str, Any], dq: str) -> None:
    assert backward_decisions(**changes)["dq"] == dq


@needs_sm90
def test_query_heads_of_few_key_heads_are_shared_out_in_backward() -> None:
    assert backward_decisions(batch=1, heads=16, heads_k=16)["head_parts"] == 1
    assert backward_decisions(batch=1, heads=16, heads_k=1)["head_parts"] >= 2


@needs_sm90
@pytest.mark.parametrize(
    "heads, seqlen_q, changes, parts",
    [
        (4, 1024, {}, 4),
        (4, 1024, {"deterministic": True}, 4),
        (8, 1024, {}, 2),
        (16, 1024, {}, 1),
        (8, 512, {}, 1),  # adding four parts up takes as long as three quarters of the rows
        (8, 512, {"heads_k": 2}, 4),  # has parts to add up anyway
        (12, 768, {"causal": 1}, 1),
        (1, 4096, {"causal": 1}, 6),
        (1, 16384, {"causal": 1}, 2),
        (8, 2304, {"causal": 1}, 1),
        (1, 4096, {"causal": 1, "window_left": 100}, 1),
        (4, 1024, {"head_dim": 256}, 2),
        (8, 1024, {"head_dim": 256}, 1),
        (8, 4096, {"seqlen_k": 100}, 16),
    ],
)
def test_rows_are_shared_out_in_backward_where_tiles_are_few(
    heads: int, seqlen_q: int, changes: dict[str, Any], parts: int
) -> None:
    assert backward_decisions(1, heads, seqlen_q, **changes)["row_parts"] == parts


@needs_sm90
def test_decisions_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    def forced(text: str, **problem: Any) -> dict[str, int | str]:
        monkeypatch.setenv("FLASH_ATTN_BACKWARD_PLAN", text)
        return backward_decisions(**problem)

    assert forced("row_parts=3")["row_parts"] == 3
    assert forced("row_parts=2", heads_k=4) | {"head_parts": 4, "row_parts": 2} == forced("row_parts=2", heads_k=4)
    assert forced("row_parts=1", batch=1, heads=4, seqlen_q=1024)["row_parts"] == 1
    assert forced("head_parts=2,preparation=0", heads_k=4)["head_parts"] == 2
    short: dict[str, Any] = {"batch": 64, "seqlen_q": 128, "head_dim": 64}
    assert [forced(f"one_cta={i}", **short)["one_cta"] for i in (0, 1)] == [0, 1]
    many: dict[str, Any] = {"batch": 16, "seqlen_q": 1024}
    assert [forced(f"dq_writing={i}", **many)["dq_writing"] for i in (0, 1)] == [0, 1]
    assert [forced(f"preparation={i}", **many)["preparation"] for i in (0, 1)] == [0, 1]
    for text, reason in (
        ("row_parts=1000", "row_parts=1000, the nearest is"),
        ("head_parts=3", "head_parts=3, the nearest is 1"),
        ("one_cta=1", "one_cta=1, the nearest is 0"),
        ("rows=3", "'rows=3' is no decision.*there are: head_parts, row_parts"),
        ("row_parts=few", "'row_parts=few' is no decision"),
        ("row_parts", "'row_parts' is no decision"),
    ):
        with pytest.raises(RuntimeError, match=f"FLASH_ATTN_BACKWARD_PLAN={text}: .*{reason}"):
            forced(text)


@needs_sm90
@pytest.mark.parametrize(
    "batch, heads, seqlen_q, changes, fused",
    [
        (1, 1, 100, {}, True),
        (10, 13, 100, {"heads_k": 1}, False),  # one CTA for each head of k
        (60, 4, 156, {}, True),
        (40, 4, 156, {}, False),  # 160 heads leave most of the second round's CTAs idle
        (24, 16, 384, {}, True),
        (20, 16, 384, {}, False),
        (24, 16, 512, {}, False),
        (24, 16, 512, {"causal": 1}, True),
        (24, 16, 512, {"causal": 1, "window_left": 100}, False),  # not every row sees the first key
        (24, 16, 640, {"causal": 1}, False),
        (60, 4, 4000, {"seqlen_k": 100}, True),
        (15, 4, 4000, {"seqlen_k": 100}, False),
        (60, 4, 4000, {"seqlen_k": 200}, True),
        (24, 16, 600, {"seqlen_k": 384}, False),
    ],
)
def test_a_short_heads_dq_stays_with_one_cta_where_these_are_busy(
    batch: int, heads: int, seqlen_q: int, changes: dict[str, int], fused: bool
) -> None:
    for head_dim in (8, 64):
        choice = plan(batch, heads, seqlen_q, head_dim, **changes)["backward"]
        assert choice["kernel"].endswith("fused dq") == choice["decisions"]["one_cta"] == fused


@needs_sm90
def test_deterministic_gradients_come_of_the_same_kernels() -> None:
    for head_dim in (64, 96, 128, 192, 256):
        ordered = plan(head_dim=head_dim, deterministic=True)["backward"]
        assert ordered["kernel"] == plan(head_dim=head_dim)["backward"]["kernel"]
        assert ordered["decisions"]["dq"] == "in a fixed order"


@needs_sm90
@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_the_published_figures_are_of_the_kernels_that_are_chosen(passes: str) -> None:
    """A planner that chooses otherwise needs new figures: benchmarks/bench.py on that GPU."""
    rows = json.loads((Path(__file__).parent.parent / f"benchmarks/results/h200/{passes}.json").read_text())["rows"]
    assert len(rows) == 36
    for row in rows:
        chosen = plan(row["batch"], row["heads"], row["seqlen"], row["head_dim"], causal=int(row["causal"]))[passes]
        assert f"{chosen['family']}: {chosen['kernel']}" == row["ours_kernel"], row


def test_a_gpu_that_the_build_has_no_code_for_gets_the_universal_kernels() -> None:
    plans = plan(device=(119, 20, 232448, 32 << 20))
    for choice in plans.values():
        assert choice["family"] == "universal"
        assert [text for name, text in choice["rejected"] if name == "sm80"] == [
            "this build has no code of the family for the device's compute capability"
        ]
