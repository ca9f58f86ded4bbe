"""torch's `context_parallel`, for whose time a function of torch's that gathers all ranks' sequence stands in F."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F


def refuse(function: str) -> None:
    """Raises where it is active: `function` would take this rank's part of the sequence for the whole of it.

    Raises:
        NotImplementedError: it is active.
    """
    standing: Any = F.scaled_dot_product_attention
    module = getattr(standing, "__globals__", {}).get("__name__", "")  # `__module__` may be copied by functools.wraps
    if module.startswith("torch."):
        raise NotImplementedError(
            f"{function} can't be used inside torch's context_parallel: it would attend to the part of the sequence on "
            f"this rank only. In place of F.scaled_dot_product_attention stands a function from {module}; use that"
        )
