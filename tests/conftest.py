from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--problems", type=int, default=200, help="number of random problems a device is tested on")
    parser.addoption(
        "--reference-device", default="cpu", help="where the reference runs for tests on a GPU; cuda is faster"
    )
    parser.addoption("--seed", type=int, default=0, help="seed of the first random problem")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FLASH_ATTN_REQUIRE_CUDA", "0") != "0" and not torch.cuda.is_available():
        raise pytest.UsageError("FLASH_ATTN_REQUIRE_CUDA is set, but torch finds no CUDA device")
    # Under pytest-xdist; with all cores' threads in each of 13 processes the suite took ten times as long.
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import problems  # not at the top: only here is it known that the package is installed

    problems.reference_device_on_cuda = config.getoption("--reference-device")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="there is no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """With FLASH_ATTN_FORCE the tests of what that family refuses are skipped; everything else has to pass."""
    try:
        return (yield)
    except RuntimeError as error:
        forced = os.environ.get("FLASH_ATTN_FORCE")
        if forced is not None and f"FLASH_ATTN_FORCE={forced} does not take this problem" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Freed memory is full of NaN, so that an output that is not written is seen."""
    torch.manual_seed(0)
    poison = [torch.full((1 << n,), float("nan")) for n in range(6, 20)]
    del poison
    if torch.cuda.is_available():
        cuda_poison = [torch.full((1 << n,), float("nan"), device="cuda") for n in range(6, 24)]
        del cuda_poison
    yield
