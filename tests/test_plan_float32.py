"""Which float32 problems go to tensor cores, as pairs of fp16, and which to kernels that multiply and add."""

from __future__ import annotations

import os
from typing import Any

import pytest

from introspection import _C, needs_kernels
from plans import A100, H200, plan

PAIRS = "of pairs of fp16"


@needs_kernels("sm80")
@pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced")
class TestPlan:
    @pytest.mark.parametrize(
        "device, head_dims", [(A100, (40, 64)), (H200, (40, 64, 100, 128, 192, 256))], ids=["A100", "H200"]
    )
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"causal": 1, "window_left": 500},
            {"heads_k": 4},
            {"seqlen_q": 700, "seqlen_k": 4096, "causal": 2},
            {"seqlen_q": 64, "seqlen_k": 4096},
            {"head_dim_v": 48},
            {"tensors": {"sinks": (1 << 20, "float32", 0, [16], [1])}},
            {"softmax_scale": -1.0},
            {"softcap": 3.0},
            {"tensors": {"alibi_slopes": (1 << 20, "float32", 0, [16], [1])}},
            {"tensors": {"attn_mask": (1 << 20, "bool", 0, [1, 1, 4096, 4096], [0, 0, 4096, 1])}},
            {"tensors": {"attn_mask": (1 << 20, "float32", 0, [4, 16, 4096, 4096], [1 << 28, 1 << 24, 4096, 1])}},
        ],
        ids=[
            *("full", "window", "grouped", "cross", "few queries", "other v", "sinks"),
            *("scale below 0", "softcap", "alibi", "bool mask", "bias"),
        ],
    )
    def test_pairs_where_tensor_cores_are_faster(
        self, options: dict[str, Any], head_dims: tuple[int, ...], device: tuple[int, int, int, int]
    ) -> None:
        if str(device[0]) not in _C.build_info()["cuda_archs"]:
            pytest.skip("built for a part of the GPUs")
        family = "sm90" if device is H200 else "sm80"
        for head_dim in head_dims:
            for choice in plan(head_dim=head_dim, dtype="float32", device=device, **options).values():
                assert (choice["family"], choice["decisions"]["products"]) == (family, PAIRS)

    @pytest.mark.parametrize("head_dim", [17, 32])
    def test_pairs_over_few_columns_where_rows_are_many(self, head_dim: int) -> None:
        if "90" not in _C.build_info()["cuda_archs"]:
            pytest.skip("built for a part of the GPUs")
        for choice in plan(batch=16, head_dim=head_dim, seqlen_q=256, seqlen_k=300, dtype="float32").values():
            assert choice["decisions"]["products"] == PAIRS

    @pytest.mark.parametrize("ending", ["", " extended"])
    def test_large_blocks_on_hopper_where_a_row_sees_many_keys(self, ending: str) -> None:
        if "90" not in _C.build_info()["cuda_archs"]:
            pytest.skip("built for a part of the GPUs")
        softcap = 3.0 if ending else 0.0
        tile = "128x64" if ending else "192x64"
        for sizes, large in (({}, True), ({"seqlen_q": 512}, False), ({"seqlen_q": 1024, "causal": 1}, False)):
            chosen = plan(head_dim=64, dtype="float32", softcap=softcap, **sizes)["forward"]["kernel"]
            assert chosen == f"wgmma fp32 d64 {tile if large else '64x64'}{ending}{' turns' if large else ''}"
            chosen = plan(head_dim=128, dtype="float32", softcap=softcap, **sizes)["forward"]["kernel"]
            assert chosen == f"wgmma fp32 d128 128x64{ending} turns"

    def test_numbers_are_rounded_only_where_that_is_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def products(head_dim: int, device: tuple[int, int, int, int] = H200) -> set[Any]:
            chosen = plan(head_dim=head_dim, dtype="float32", device=device)
            return {choice["decisions"].get("products") for choice in chosen.values()}

        if "90" not in _C.build_info()["cuda_archs"]:
            pytest.skip("built for a part of the GPUs")
        for precision in ("", "exact"):
            monkeypatch.setenv("FLASH_ATTN_FLOAT32", precision)
            assert products(64) == {PAIRS}
        monkeypatch.setenv("FLASH_ATTN_FLOAT32", "reduced")
        assert products(64) == products(128) == {"of numbers rounded to fp16"}
        assert products(256) == {PAIRS}  # for which there are no such kernels
        monkeypatch.setenv("FLASH_ATTN_FLOAT32", "tf32")
        with pytest.raises(RuntimeError, match="FLASH_ATTN_FLOAT32=tf32: accepted are exact and reduced"):
            plan(head_dim=64, dtype="float32")

    @pytest.mark.parametrize(
        "device, changes, reason",
        [
            (H200, {"batch": 1, "heads": 2, "seqlen_q": 128}, "so few scores"),
            (H200, {"seqlen_q": 16, "seqlen_k": 4096}, "so few scores"),
            (H200, {"head_dim": 32, "seqlen_q": 200}, "few columns"),
            (H200, {"head_dim": 32, "seqlen_k": 200}, "few columns"),
            *(((capability, 82, 101376, 6 << 20), {}, "half rate") for capability in (86, 89, 120)),
        ],
    )
    def test_multiply_adds_where_they_are_faster(
        self,
        device: tuple[int, int, int, int],
        changes: dict[str, Any],
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if not {"80", "90", "120"} <= set(_C.build_info()["cuda_archs"].replace("-real", "").split()):
            pytest.skip("built for a part of the GPUs")
        options = {"head_dim": 64, **changes}
        for choice in plan(dtype="float32", device=device, **options).values():
            assert choice["family"] == "universal"
            assert any(reason in text for family, text in choice["rejected"] if family == "sm80")
        if device[0] // 10 == 12:  # which there is no such code for
            return
        monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
        for choice in plan(dtype="float32", device=device, **options).values():
            assert choice["family"] == "sm80"

    @pytest.mark.parametrize(
        "changes, reason",
        [
            ({"head_dim": 72}, "head_dim is over 64"),
            ({"head_dim": 16}, "few columns"),
        ],
    )
    def test_what_they_do_not_take(self, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if "90" not in _C.build_info()["cuda_archs"]:
            pytest.skip("built for a part of the GPUs")
        monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
        with pytest.raises(RuntimeError, match=reason):
            plan(**{"head_dim": 64, **changes}, dtype="float32")

    def test_who_computes_the_gradient_of_a_bias(self) -> None:
        """The kernel that has dS, where the order does not matter and no tiles meet at one place."""
        if "90" not in _C.build_info()["cuda_archs"]:
            pytest.skip("built for a part of the GPUs")

        def bias(rows: int) -> dict[str, Any]:
            shape = [1, 16, rows, 4096]
            return {"attn_mask": (1 << 20, "float32", 0, shape, [0, rows * 4096, 4096 if rows > 1 else 0, 1])}

        def decided(rows: int = 4096, **options: Any) -> object:
            choice = plan(head_dim=64, dtype="float32", tensors=bias(rows), wants_dmask=True, **options)["backward"]
            return choice["decisions"].get("dmask")

        assert decided() == "added to zeros"
        assert decided(deterministic=True) is None
        assert decided(softcap=30.0) is None
        assert decided(rows=1) is None

    @pytest.mark.parametrize(
        "options, kernel, of_dq",
        [
            ({}, "mma fp32 d64 64x32", "added to zeros"),
            ({"softcap": 3.0}, "mma fp32 d64 64x32 extended", "added to zeros"),
            ({"head_dim": 32}, "mma fp32 d32 64x64", "added to zeros"),
            ({"deterministic": True}, "mma fp32 d64 64 keys x 32", "mma fp32 d64 64 queries x 64"),
        ],
        ids=["full", "softcap", "few columns", "fixed order"],
    )
    def test_one_kernel_for_all_gradients_where_their_order_is_free(
        self, options: dict[str, Any], kernel: str, of_dq: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if "90" not in _C.build_info()["cuda_archs"]:
            pytest.skip("built for a part of the GPUs")
        monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
        chosen = plan(**{"head_dim": 64, **options}, dtype="float32")["backward"]
        assert (chosen["kernel"], chosen["decisions"]["dq"]) == (kernel, of_dq)

    def test_memory_is_that_of_the_inputs_once_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if "90" not in _C.build_info()["cuda_archs"]:
            pytest.skip("built for a part of the GPUs")
        monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
        tensor = 4 * 16 * 4096 * 64 * 4
        plans = plan(head_dim=64, dtype="float32")
        assert 3 * tensor <= plans["forward"]["workspace_bytes"] < 3.1 * tensor
        assert 4 * tensor <= plans["backward"]["workspace_bytes"] < 4.2 * tensor
