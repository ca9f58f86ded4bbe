"""Plans of the mma.sync family for GPUs that need not be there: no kernel runs."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

from plans import A100, H200, plan

_C = importlib.import_module("flash_attn._C")

# Compute capability, SMs, shared memory of a block, L2 cache.
RTX_3090 = (86, 82, 101376, 6 << 20)
RTX_4090 = (89, 128, 101376, 72 << 20)
B200 = (100, 148, 232448, 126 << 20)
RTX_5090 = (120, 170, 101376, 96 << 20)
RNG_STATE = {"rng_state": (1 << 20, "int64", 0, [2], [1])}
HEAD_DIMS = (32, 64, 96, 128, 192, 256)

pytestmark = [
    pytest.mark.skipif("cuda" not in _C.kernels(), reason="built without CUDA kernels"),
    pytest.mark.skipif(
        any(arch not in _C.build_info()["cuda_archs"] for arch in ("80", "90", "100", "120")),
        reason="built for a part of the GPUs",
    ),
    pytest.mark.skipif("FLASH_ATTN_FORCE" in os.environ, reason="a family is forced"),
]

# By shared memory of a block, the kernel of each head dimension.
KERNELS = {
    101376: ("64x64 w4", "64x128 w8", "64x64 w4", "32x64 w4", "32x64 w8 s1", "32x32 w4 s1"),
    166912: ("64x64 w4", "128x128 w8", "64x128 w8", "64x128 w8", "64x64 w8", "64x64 w8 s1"),
    232448: ("64x64 w4", "128x128 w8", "64x128 w8", "64x128 w8", "128x64 w8 s1", "128x64 w8 s1"),
}


@pytest.mark.parametrize("device", [A100, RTX_3090, RTX_4090, B200, RTX_5090], ids=lambda device: f"sm_{device[0]}")
@pytest.mark.parametrize("index", range(6), ids=[f"d{d}" for d in HEAD_DIMS])
def test_backward_takes_the_largest_tiles_that_fit(index: int, device: tuple[int, int, int, int]) -> None:
    head_dim = HEAD_DIMS[index]
    choice = plan(head_dim=head_dim, device=device)["backward"]
    # For compute capability 10 there is no code of a kernel whose registers ptxas would spill.
    tiles = "64x64 w8" if device is B200 and head_dim == 192 else KERNELS[device[2]][index]
    assert (choice["family"], choice["kernel"]) == ("sm80", f"mma d{head_dim} {tiles}")


@pytest.mark.parametrize(
    "device", [A100, RTX_3090, RTX_4090, H200, B200, RTX_5090], ids=lambda device: f"sm_{device[0]}"
)
@pytest.mark.parametrize("head_dim", (8, 20, 61, 96, 100, 128, 160, 192, 256))
@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"dropout_p": 0.1}, {}], ids=str)
def test_no_feature_falls_to_the_universal_kernels(
    options: dict[str, float], head_dim: int, device: tuple[int, int, int, int]
) -> None:
    tensors = RNG_STATE if "dropout_p" in options else None
    choice = plan(head_dim=head_dim, device=device, tensors=tensors, **options)["backward"]
    assert choice["family"] in ("sm80", "sm90")
    if device[0] != 90:
        assert choice["family"] == "sm80"


def test_a_gpu_of_turing_gets_the_universal_kernels() -> None:
    choice = plan(device=(75, 40, 65536, 4 << 20))["backward"]
    assert choice["family"] == "universal"
    assert ("sm80", "the device is older than compute capability 8.0") in choice["rejected"]


def test_head_dims_over_512_are_refused_with_their_reason() -> None:
    choice = plan(head_dim=520, device=A100)
    for of_pass in (choice["forward"], choice["backward"]):
        assert ("sm80", "head_dim is over 512") in of_pass["rejected"]


# By shared memory of a block: the plain forward kernel of each head dimension, and how many blocks an SM holds.
FORWARD_KERNELS = {
    101376: {64: "128x48", 96: "64x64", 128: "128x64", 192: "64x64 s2", 256: "64x64 rows", 512: "32x32"},
    166912: {64: "128x128", 96: "128x64", 128: "128x64", 192: "64x64 s2", 256: "64x64", 512: "64x32"},
    232448: {64: "128x128", 96: "128x64", 128: "128x64", 192: "64x64", 256: "64x64", 512: "64x64"},
}
FORWARD_BLOCKS = {
    101376: {64: 2, 96: 2, 128: 1, 192: 1, 256: 1, 512: 1},
    166912: {64: 2, 96: 2, 128: 2, 192: 2, 256: 1, 512: 1},
    232448: {64: 2, 96: 2, 128: 2, 192: 2, 256: 2, 512: 1},
}


@pytest.mark.parametrize("device", [A100, RTX_3090, RTX_4090, B200, RTX_5090], ids=lambda device: f"sm_{device[0]}")
@pytest.mark.parametrize("head_dim", (64, 96, 128, 192, 256, 512))
def test_forward_kernels_and_how_many_of_their_blocks_fit(head_dim: int, device: tuple[int, int, int, int]) -> None:
    choice = plan(head_dim=head_dim, device=device)["forward"]
    assert (choice["family"], choice["kernel"]) == ("sm80", f"mma d{head_dim} {FORWARD_KERNELS[device[2]][head_dim]}")
    assert choice["decisions"]["blocks_per_sm"] == FORWARD_BLOCKS[device[2]][head_dim]


@pytest.mark.parametrize(
    "device", [A100, RTX_3090, RTX_4090, H200, B200, RTX_5090], ids=lambda device: f"sm_{device[0]}"
)
@pytest.mark.parametrize("head_dim", (8, 20, 61, 96, 100, 160, 256, 320, 512))
@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"dropout_p": 0.1}, {}], ids=str)
def test_no_forward_feature_falls_to_the_universal_kernels(
    options: dict[str, float], head_dim: int, device: tuple[int, int, int, int]
) -> None:
    tensors = RNG_STATE if "dropout_p" in options else {}
    masked = tensors | {"attn_mask": (1 << 20, "bool", 0, [1, 1, 4096, 4096], [0, 0, 4096, 1])}
    for given in (tensors, masked):
        choice = plan(head_dim=head_dim, device=device, tensors=given, **options)["forward"]
        assert choice["family"] in ("sm80", "sm90")
        if device[0] != 90:
            assert choice["family"] == "sm80"


@pytest.mark.parametrize("head_dim", (61, 100))
def test_explains_that_rows_are_read_element_by_element(head_dim: int) -> None:
    choice = plan(head_dim=head_dim, device=A100)
    for of_pass in (choice["forward"], choice["backward"]):
        assert of_pass["decisions"]["loads"] == "by element"


def _mask(dtype: str, stride: int = 4096) -> dict[str, tuple[int, str, int, list[int], list[int]]]:
    """`stride`: of its rows."""
    return {"attn_mask": (1 << 20, dtype, 0, [1, 16, 4096, 4096], [0, stride * 4096, stride, 1])}


@pytest.mark.parametrize("device", [A100, RTX_4090, B200], ids=lambda device: f"sm_{device[0]}")
@pytest.mark.parametrize("head_dim", (64, 96, 128))
def test_dropout_masks_and_biases_have_kernels_of_their_own(head_dim: int, device: tuple[int, int, int, int]) -> None:
    def kernels(tensors: dict, **options: float) -> list[str]:  # type: ignore[type-arg]
        choice = plan(head_dim=head_dim, device=device, tensors=tensors, **options)
        return [choice[of_pass]["kernel"].split()[-1] for of_pass in ("forward", "backward")]

    assert kernels(RNG_STATE, dropout_p=0.1) == ["dropout", "dropout"]
    assert kernels(_mask("bool")) == ["mask", "mask"]
    # Backward P of a warp makes room for its biases where it has 32 queries.
    few = head_dim == 128 and device is RTX_4090
    assert kernels(_mask("bfloat16")) == ["bias", "extended" if few else "bias"]
    # What is more than one of them, and rows that 16-byte pieces do not fit.
    assert kernels(RNG_STATE | _mask("bool"), dropout_p=0.1) == ["extended", "extended"]
    assert kernels(_mask("bfloat16", 4100)) == ["extended", "extended"]
    assert kernels(_mask("float32")) == ["extended", "extended"]


# Head dims that have forward kernels of their own for rules of scores, and backward kernels for dropout.
@pytest.mark.parametrize(
    "device, forward, backward",
    [
        (A100, (192, 256), ()),
        (RTX_4090, (192,), ()),
        (H200, (192, 256), (192, 256)),
        (B200, (192, 256), (256,)),
        (RTX_5090, (), ()),
    ],
    ids=["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"],
)
@pytest.mark.parametrize("head_dim", (192, 256))
def test_rules_of_large_heads_have_kernels_where_shared_memory_holds_them(
    head_dim: int,
    device: tuple[int, int, int, int],
    forward: tuple[int, ...],
    backward: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
    for rule, tensors, options in (
        ("dropout", RNG_STATE, {"dropout_p": 0.1}),
        ("mask", _mask("bool"), {}),
        ("bias", _mask("bfloat16"), {}),
    ):
        choice = plan(head_dim=head_dim, device=device, tensors=tensors, **options)  # type: ignore[arg-type]
        assert choice["forward"]["kernel"].split()[-1] == (rule if head_dim in forward else "extended")
        own = rule == "dropout" and head_dim in backward
        assert choice["backward"]["kernel"].split()[-1] == (rule if own else "extended")


README = Path(__file__).parents[1] / "csrc/cuda/sm80/README.md"


def _readme_tables() -> list[dict[int, list[str]]]:
    """By head dimension the cells of each of the two tables, without and with rules of scores; one a column."""
    tables: list[dict[int, list[str]]] = []
    for line in README.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "head dim":
            tables.append({})
        elif tables and cells[0].isdigit():
            row = tables[-1][int(cells[0])] = cells[1:]
            row[-1] = row[-2] if row[-1] == "as 9.0" else row[-1]
    return tables


# A GPU of each architecture, and its column.
COLUMNS = [(A100, 0), (RTX_3090, 1), (RTX_4090, 1), (RTX_5090, 1), (H200, 2), (B200, 3)]


@pytest.mark.parametrize("device, column", COLUMNS, ids=[f"sm_{device[0]}" for device, _ in COLUMNS])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
def test_the_readme_says_which_kernels_a_gpu_gets(
    options: dict[str, float], device: tuple[int, int, int, int], column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = _readme_tables()[len(options)]
    assert sorted(table) == [*([] if options else [32]), 64, 96, 128, 192, 256, 512]
    for head_dim, cells in table.items():
        forward, backward = cells[column].split("; ")
        # Of a family that is asked for all of a problem has to be taken.
        if backward != "universal":
            monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")
        choice = plan(head_dim=head_dim, device=device, **options)
        monkeypatch.delenv("FLASH_ATTN_FORCE", raising=False)
        tile, blocks = forward.split(" on ")
        assert re.match(rf"mma d{head_dim} {tile}( |$)", choice["forward"]["kernel"]), (head_dim, choice["forward"])
        assert choice["forward"]["decisions"]["blocks_per_sm"] == int(blocks)
        kernel = choice["backward"]["kernel"]
        if backward == "universal":
            assert choice["backward"]["family"] == "universal"
        else:
            assert re.match(rf"mma d{head_dim} {backward}( |$)", kernel), (head_dim, kernel)
        assert kernel.endswith("extended") == (bool(options) and backward != "universal")


def test_keys_of_few_tiles_are_shared_out() -> None:
    assert plan(1, 1, 16384, device=A100)["forward"]["decisions"]["splits"] >= 2
    assert "splits" not in plan(4, 16, 4096, device=A100)["forward"]["decisions"]
    assert "splits" not in plan(1, 1, 128, seqlen_k=64, device=A100)["forward"]["decisions"]


def test_few_tiles_take_kernels_that_begin_fast() -> None:
    assert plan(1, 8, 1024, 64, seqlen_k=77, device=A100)["forward"]["kernel"] == "mma d64 64x64"
    assert plan(1, 8, 1024, 128, seqlen_k=77, device=A100)["forward"]["kernel"] == "mma d128 64x64"


def test_query_rows_of_few_tiles_are_shared_out() -> None:
    few = plan(1, 1, 4096, device=A100)["backward"]
    assert few["decisions"]["parts"] >= 2
    assert "parts" not in plan(1, 1, 4096, device=A100, deterministic=True)["backward"]["decisions"]
    assert "parts" not in plan(4, 16, 4096, device=A100)["backward"]["decisions"]


def test_blocks_of_keys_begin_with_rows_of_their_own_where_others_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_FORCE", "sm80")

    def spread(batch: int, heads: int, seqlen: int) -> int:
        choice = plan(batch, heads, seqlen, 256, deterministic=True)["backward"]
        assert choice["kernel"] == "mma d256 128x64 w8 s1"  # twice as many blocks of keys as of query rows
        return int(choice["decisions"]["spread"])

    assert spread(4, 8, 4096) == 32
    assert spread(32, 8, 512) == 4
    assert spread(1, 1, 4096) == 64  # all at a time: nobody else is there
    assert spread(1, 8, 16384) == 64  # half of what the GPU holds


def test_rows_of_few_blocks_are_shared_out() -> None:
    assert plan(1, 8, 512, 256, device=A100)["backward"]["decisions"]["row_shares"] == 4
    assert "row_shares" not in plan(4, 16, 4096, device=A100)["backward"]["decisions"]


def test_a_backward_kernel_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mma d96 64x128 w8", "mma d96 64x64 w4"):
        monkeypatch.setenv("FLASH_ATTN_BACKWARD_KERNEL", name)
        assert plan(head_dim=96, device=A100)["backward"]["kernel"] == name


@pytest.mark.parametrize("name", ["mma d128 64x128 w8", "mma d96 64x64 w8", "d96 64x64 w4"])
def test_a_backward_kernel_that_does_not_take_the_problem_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTN_BACKWARD_KERNEL", name)
    head_dim = 160 if "d128" in name else 96
    reason = f"FLASH_ATTN_BACKWARD_KERNEL={name} does not take this problem; .* are: mma d"
    with pytest.raises(RuntimeError, match=reason):
        plan(head_dim=head_dim, device=A100)


@pytest.mark.parametrize("device", [H200, B200], ids=lambda device: f"sm_{device[0]}")
def test_gradients_of_head_dims_to_512_where_shared_memory_holds_them(device: tuple[int, int, int, int]) -> None:
    assert plan(head_dim=512, device=device)["backward"]["kernel"] == "mma d512 64x32 w8 s1"
    assert plan(head_dim=320, softcap=3.0, device=device)["backward"]["kernel"] == "mma d512 64x32 w8 s1 extended"
    choice = plan(head_dim=512, device=A100)["backward"]
    assert choice["family"] == "universal"
    assert ("sm80", "no kernel of this head dimension does what is asked for") in choice["rejected"]
