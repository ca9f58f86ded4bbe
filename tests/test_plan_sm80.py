"""Plans of the mma.sync family's backward pass for GPUs that need not be there: no kernel runs."""

from __future__ import annotations

import importlib
import os

import pytest

from test_plan import plan

_C = importlib.import_module("flash_attn._C")

# Compute capability, SMs, shared memory of a block, L2 cache.
A100 = (80, 108, 166912, 40 << 20)
RTX_3090 = (86, 82, 101376, 6 << 20)
RTX_4090 = (89, 128, 101376, 72 << 20)
H200 = (90, 132, 232448, 60 << 20)
B200 = (100, 148, 232448, 126 << 20)
RTX_5090 = (120, 170, 101376, 96 << 20)
HEAD_DIMS = (64, 96, 128, 192, 256)

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
    101376: ("64x128 w8", "64x64 w4", "32x64 w4", "32x64 w8 s1", "32x32 w4 s1"),
    166912: ("128x128 w8", "64x64 w4", "64x128 w8", "64x64 w8", "64x64 w8 s1"),
    232448: ("128x128 w8", "64x64 w4", "64x128 w8", "128x64 w8 s1", "128x64 w8 s1"),
}


@pytest.mark.parametrize("device", [A100, RTX_3090, RTX_4090, B200, RTX_5090], ids=lambda device: f"sm_{device[0]}")
@pytest.mark.parametrize("index", range(5), ids=[f"d{d}" for d in HEAD_DIMS])
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
    tensors = {"rng_state": (1 << 20, "int64", 0, [2], [1])} if "dropout_p" in options else None
    choice = plan(head_dim=head_dim, device=device, tensors=tensors, **options)["backward"]
    assert choice["family"] in ("sm80", "sm90")
    if device[0] != 90:
        assert choice["family"] == "sm80"


def test_a_gpu_of_turing_gets_the_universal_kernels() -> None:
    choice = plan(device=(75, 40, 65536, 4 << 20))["backward"]
    assert choice["family"] == "universal"
    assert ("sm80", "the device is older than compute capability 8.0") in choice["rejected"]


def test_head_dims_over_256_are_refused_with_their_reason() -> None:
    choice = plan(head_dim=264, device=A100)["backward"]
    assert ("sm80", "head_dim is over 256") in choice["rejected"]
