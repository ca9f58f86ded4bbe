"""Which Hopper kernels problems with masks and rules of scores get."""

from __future__ import annotations

import os
from typing import Any

import pytest

from introspection import needs_kernels
from plans import plan
from problems import HOPPER_BIASED, HOPPER_EXTENDED, forward_head_dims

pytestmark = pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced")
needs_sm90 = needs_kernels("sm90")
ROW = (1 << 20, "float32", 0, [16], [1])
SCORES: list[tuple[dict[str, Any], str]] = [
    ({"softcap": 3.0}, "softcap"),
    ({"tensors": {"sinks": ROW}}, "sinks"),
    ({"tensors": {"alibi_slopes": ROW}}, "alibi_slopes"),
    ({"tensors": {"rng_state": (1 << 20, "int64", 0, [2], [1])}, "dropout_p": 0.1}, "dropout"),
    ({"tensors": {"attn_mask": (1 << 20, "bool", 0, [1, 1, 4096, 4096], [0, 0, 4096, 1])}}, "attn_mask"),
    ({"tensors": {"attn_mask": (1 << 20, "bfloat16", 0, [1, 1, 4096, 4096], [0, 0, 4096, 1])}}, "attn_mask"),
]


@needs_sm90
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("changes, reason", SCORES)
@pytest.mark.parametrize("causal", [0, 1])
def test_masks_and_rules_of_scores_get_extended_kernels(
    changes: dict[str, Any], reason: str, causal: int, head_dim: int
) -> None:
    plans = plan(head_dim=head_dim, causal=causal, **changes)
    kind = "biased" if "bfloat16" in str(changes) else "extended"
    assert plans["forward"]["family"] == "sm90"
    assert f" {kind}" in plans["forward"]["kernel"]


@needs_sm90
@pytest.mark.parametrize("kind, names", [("extended", HOPPER_EXTENDED), ("biased", HOPPER_BIASED)])
def test_an_extended_kernel_can_be_asked_for_by_its_name(
    kind: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = "bool" if kind == "extended" else "float32"
    tensors = {"attn_mask": (1 << 20, dtype, 0, [1, 1, 4096, 4096], [0, 0, 4096, 1])}
    for name in names:
        monkeypatch.setenv("FLASH_ATTN_FORWARD_KERNEL", name)
        chosen = plan(head_dim=forward_head_dims(name)[0], tensors=tensors)["forward"]["kernel"]
        assert chosen.startswith(f"wgmma {name} {kind}")


@needs_sm90
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_passes_over_rules_of_scores_is_a_kernel_of_its_own(head_dim: int) -> None:
    tensors = {"attn_mask": (1 << 20, "bool", 0, [1, 1, 4096, 4096], [0, 0, 4096, 1])}
    for options, rules in (({}, False), ({"softcap": 3.0}, True)):
        kernel = plan(head_dim=head_dim, tensors=tensors, **options)["forward"]["kernel"]
        assert kernel.endswith("rules") == rules


@needs_sm90
@pytest.mark.parametrize("changes", [changes for changes, _ in SCORES])
@pytest.mark.parametrize(
    "head_dim, kernel",
    [
        (40, "d64 128x128"),
        (96, "d96 64x128"),
        (128, "d128 64x128"),
        (136, "d192 64x128 pair"),
        (200, "d256 64x128 pair"),
    ],
)
def test_what_changes_scores_has_backward_kernels_of_its_own(
    head_dim: int, kernel: str, changes: dict[str, Any]
) -> None:
    chosen = plan(head_dim=head_dim, **changes)["backward"]
    biased = " biased" if head_dim == 40 and "bfloat16" in str(changes) else ""
    assert (chosen["family"], chosen["kernel"]) == ("sm90", f"wgmma {kernel} extended{biased}")
    assert chosen["decisions"]["dq"] == ("first stores" if head_dim in (96, 128) else "added to zeros")
    fixed = plan(head_dim=head_dim, deterministic=True, **changes)["backward"]["decisions"]
    assert fixed["dq"] == "in a fixed order"
    assert fixed["order"] == ("last" if "attn_mask" in str(changes) else "first") + " columns first"


@needs_sm90
@pytest.mark.parametrize(
    "sizes, changes, how",
    [
        ((4, 16), {}, "stored by tiles"),
        ((1, 16), {}, "added by tiles in turn"),
        ((4, 1), {}, "by another launch"),  # 16 scores share a number: it is read ahead, for blocks to pass over
        ((1, 16), {"deterministic": True}, "by another launch"),
        ((4, 16), {"dropout_p": 0.1}, "by another launch"),
        ((4, 16), {"head_dim": 64}, "stored by tiles"),
        ((4, 16), {"head_dim": 256}, "stored by tiles"),
        ((1, 16), {"head_dim": 256}, "added by tiles in turn"),
        ((1, 16), {"head_dim": 256, "deterministic": True}, "added by tiles in turn"),
    ],
)
def test_tiles_add_up_the_gradient_of_a_bias_where_few_scores_share_it(
    sizes: tuple[int, int], changes: dict[str, Any], how: str
) -> None:
    shape, strides = [*sizes, 4096, 4096], [sizes[1] << 24, 1 << 24, 4096, 1]
    tensors = {
        "attn_mask": (1 << 20, "bfloat16", 0, shape, [0 if n == 1 else x for n, x in zip(shape, strides, strict=True)])
    }
    if "dropout_p" in changes:
        tensors["rng_state"] = (1 << 20, "int64", 0, [2], [1])
    chosen = plan(tensors=tensors, wants_dmask=True, **changes)["backward"]
    assert chosen["family"] == "sm90" and chosen["decisions"]["dmask"] == how


@needs_sm90
@pytest.mark.parametrize(
    "seqlen, dtype, forward, backward, looks",
    [
        (512, "bool", "packed first", "read with rows", None),
        (4096, "bool", "packed first", "packed first", None),
        (512, "bfloat16", "read by tiles", "read by tiles", False),  # though all heads share it
        (520, "bfloat16", "packed first", "packed first", None),
        (256, "float32", "read by tiles", "read by tiles", False),
        (512, "float32", "read by tiles", "packed first", False),
        (520, "float32", "packed first", "packed first", None),
    ],
)
def test_no_launch_comes_first_to_read_a_mask_of_few_scores(
    seqlen: int, dtype: str, forward: str, backward: str, looks: bool | None
) -> None:
    shape, strides = [1, 1, seqlen, seqlen], [0, 0, seqlen, 1]
    plans = plan(batch=2, seqlen_q=seqlen, tensors={"attn_mask": (1 << 20, dtype, 0, shape, strides)})
    assert plans["forward"]["decisions"]["mask"] == forward
    assert plans["backward"]["decisions"]["mask"] == backward
    if looks is not None:  # at V, into the workspace
        assert (plans["forward"]["workspace_bytes"] > 0) == looks


@needs_sm90
def test_under_a_bias_of_more_scores_a_launch_looks_at_all_values() -> None:
    for seqlen in (512, 1024):
        shape, strides = [2, 16, seqlen, seqlen], [16 * seqlen**2, seqlen**2, seqlen, 1]
        mask = {"attn_mask": (1 << 20, "bfloat16", 0, shape, strides)}
        chosen = plan(batch=2, seqlen_q=seqlen, tensors=mask)["forward"]
        words = 0 if seqlen == 512 else 2 * 16 * (seqlen // 64) * 8
        assert chosen["decisions"]["mask"] == "read by tiles"
        assert chosen["workspace_bytes"] - words in (0, 256)  # and a counter of tiles
