"""`replace_sdpa`: this package's function in place of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

from .sdpa import call_torch, overridden, scaled_dot_product_attention
from .sdpa_arguments import Arguments
from .torch_op.private import flash_sdp_enabled


@functools.wraps(scaled_dot_product_attention)
def _replacement(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    given = Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    # `sdpa_kernel` without FLASH_ATTENTION asks for another of torch's kernels: comparisons with them must stay true.
    if not flash_sdp_enabled():
        return call_torch(given)
    if has_torch_function((query, key, value, attn_mask)):
        # Who looks out for torch's function compares with what stands in its place, not with ours.
        return overridden(_replacement, given)
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class replace_sdpa:  # noqa: N801 - used as a function
    """Puts this package's function in place of `torch.nn.functional.scaled_dot_product_attention`.

    ``replace_sdpa()`` does so for the whole process, until `restore` is called on the result;
    ``with replace_sdpa():`` until the block ends. What was there before is put back exactly. Inside
    `torch.nn.attention.sdpa_kernel([...])` without FLASH_ATTENTION torch's own function runs; compiled code keeps to
    what held when it was traced. Code that imported the function by name beforehand, and the inference fast path of
    `nn.TransformerEncoderLayer`, are not reached.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self.__enter__()

    def restore(self) -> None:
        """Puts back what was there before. More than one replacement are restored last first."""
        if self._previous is not None:
            F.scaled_dot_product_attention, self._previous = self._previous, None

    def __enter__(self) -> replace_sdpa:
        if self._previous is None:
            self._previous = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = _replacement  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
