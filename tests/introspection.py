"""flash_attn._C, for tests of what it says. It was built for one Python version; the op library works without it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest

# One that is there but does not load is an error.
_C: Any = importlib.import_module("flash_attn._C") if importlib.util.find_spec("flash_attn._C") else None

# In the order in which they are asked: none without CUDA kernels.
CUDA_FAMILIES: list[str] = _C.kernels().get("cuda", ([], []))[0] if _C else []

needs_introspection = pytest.mark.skipif(_C is None, reason="flash_attn._C was built for another Python version")


def needs_kernels(family: str) -> pytest.MarkDecorator:
    """For tests of plans of this family of CUDA kernels."""
    if _C is None:
        return needs_introspection
    return pytest.mark.skipif(family not in CUDA_FAMILIES, reason=f"built without the CUDA kernels of {family}")
