"""Gradients against finite differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_attn.torch_op import attention as ops
from problems import Problem, make_inputs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

PROBLEMS = {
    "causal": {"causal": 1},
    "window and grouped heads": {"heads": 4, "window": (2, 1)},
    "bias over heads": {"mask": "float", "mask_dims": (False, True, True, True)},
    "softcap": {"softcap": 1.5},
    "slopes and sinks": {"slopes": "batch", "sinks": True},
    "dropout": {"dropout": 0.3},
    "packed": {"packed": True, "used_k": True},
    "all at once": {
        "causal": 2,
        "mask": "float",
        "mask_dims": (True, False, True, True),
        "softcap": 2.0,
        "slopes": "head",
        "sinks": True,
        "dropout": 0.2,
        "packed": True,
        "heads": 4,
        "head_dim_v": 3,
    },
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_out_and_lse(name: str, device: str) -> None:
    sizes: dict[str, Any] = {"seqlen_q": 5, "seqlen_k": 6, "head_dim": 4, "head_dim_v": 4} | PROBLEMS[name]
    inputs = make_inputs(Problem(dtype=torch.float64, **sizes), device)

    def attend(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = inputs.tensors | dict(zip(inputs.leaves, leaves, strict=True))
        out, lse = ops.attention(**tensors, **inputs.options)
        return out, lse.masked_fill(torch.isinf(lse), 0.0)

    assert torch.autograd.gradcheck(attend, tuple(inputs.leaves.values()), nondet_tol=0.0)
