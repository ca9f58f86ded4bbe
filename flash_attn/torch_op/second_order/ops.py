"""The two ops as torch has them: kernels and fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import split_backward_jvp, split_forward_jvp
from ..library import backward_jvp_op, empty_gradients, empty_outputs, forward_jvp_op, registrations
from ..registered.refusals import refuse_backward_jvp, refuse_forward_jvp
from .tangents import backward_jvp, forward_jvp


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = split_forward_jvp(arguments)
    refuse_forward_jvp(given)
    return forward_jvp(*given)


def _backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    given = split_backward_jvp(arguments)
    refuse_backward_jvp(given)
    return backward_jvp(*given)


for _device in ("CPU", "CUDA"):
    registrations().impl(forward_jvp_op, _forward, _device)
    registrations().impl(backward_jvp_op, _backward, _device)


@torch.library.register_fake("flash_attn::forward_jvp", lib=registrations())
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, tensors, _, _, options = given = split_forward_jvp(arguments)
    refuse_forward_jvp(given)
    return empty_outputs(tensors.q, tensors.v, options.heads_first, tensors.cu_seqlens_q is not None)


@torch.library.register_fake("flash_attn::backward_jvp", lib=registrations())
def _backward_fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    given = split_backward_jvp(arguments)
    refuse_backward_jvp(given)
    return empty_gradients(given.tensors, given.needs)
