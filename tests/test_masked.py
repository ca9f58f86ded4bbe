"""The short way of eager calls with a mask: who takes it, and that it is the same as the long one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import scaled_dot_product_attention as sdpa
from flash_attn.sdpa import attention as front
from flash_attn.torch_op import masked


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call with a mask was served by the short way."""
    served: list[bool] = []
    attend = masked.try_attend

    def recorded(*args: Any) -> Tensor | None:
        out = attend(*args)
        served.append(out is not None)
        return out

    monkeypatch.setattr(masked, "try_attend", recorded)
    return served


def _leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


def _masks(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    seen = torch.rand(2, 3, 5, 5) < 0.6
    seen[..., 0] = True
    bias = torch.randn(1, 3, 5, 5, dtype=dtype)
    return [seen, seen[:, :1, :1], seen[:1], bias, bias[:, :1].requires_grad_(), bias[..., :1, :].requires_grad_()]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("i", range(6))
def test_it_is_the_long_way_and_torchs_result(
    i: int, scale: float | None, is_causal: bool, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, mask = _leaves(), _masks()[i]
    wanted = [*leaves, *([mask] if mask.requires_grad else [])]
    weight = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def results(attend: Callable[..., Tensor], mask: Tensor, **options: Any) -> tuple[Tensor, ...]:
        out = attend(*leaves, mask, scale=scale, **options)
        with torch.no_grad():
            assert torch.equal(attend(*leaves, mask, scale=scale, **options), out)
        return (out, *torch.autograd.grad(out, wanted, weight))

    short = results(sdpa, mask, is_causal=is_causal)
    assert taken == [True, True]
    monkeypatch.setattr(front.masked, "try_attend", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(short, results(sdpa, mask, is_causal=is_causal), strict=True))
    both = mask
    if is_causal:  # torch takes one of them
        triangle = torch.ones(5, 5, dtype=torch.bool).tril()
        both = mask & triangle if mask.dtype == torch.bool else mask.masked_fill(~triangle, -torch.inf)
    torch.testing.assert_close(short, results(F.scaled_dot_product_attention, both))


def test_what_it_cannot_do_goes_the_long_way(taken: list[bool]) -> None:
    (q, k, v), seen = _leaves(), torch.ones(5, 5, dtype=torch.bool)
    sdpa(q, k, v, seen)  # two dimensions
    sdpa(q, k[:, :1], v[:, :1], seen[None, None], enable_gqa=True)
    sdpa(q[0], k[0], v[0], seen[None])
    sdpa(q, k[:1], v[:1], seen[None, None])
    sdpa(q, k, v, torch.zeros(1, 1, 5, 5))  # float32 beside float64
    with torch.autocast("cpu"):
        sdpa(q.float(), k.float(), v.float(), seen[None, None])
    assert not any(taken)
    taken.clear()
    for dropout_p in (0.5, 1.0):
        sdpa(q, k, v, seen[None, None], dropout_p)
    assert taken == []


def test_nor_what_is_wrong_which_has_its_own_words(taken: list[bool]) -> None:
    q, k, v = _leaves()
    with pytest.raises(RuntimeError, match="attn_mask must broadcast to"):
        sdpa(q, k, v, torch.ones(1, 1, 5, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="attn_mask must be bool, float32 or query's dtype"):
        sdpa(q, k, v, torch.zeros(1, 1, 5, 5, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="same last dimension"):
        sdpa(q, k[..., :4], v, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert not any(taken)


def test_under_autocast_that_changes_nothing_it_is_taken(taken: list[bool]) -> None:
    q, k, v = _leaves(torch.bfloat16)
    with torch.autocast("cpu"):
        for mask in _masks(torch.bfloat16):
            sdpa(q, k, v, mask)
        assert all(taken) and len(taken) == 6
        sdpa(q, k, v, torch.zeros(1, 1, 5, 5))
    assert not taken[-1]


def test_who_watches_sees_the_op(taken: list[bool]) -> None:
    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    seen: list[str] = []
    with Watcher():
        sdpa(*_leaves(), torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert taken == [False] and "flash_attn.forward.default" in seen


def test_gradients_are_repeatable_where_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    forward = masked.apply_attention
    monkeypatch.setattr(masked, "apply_attention", lambda t, o: given.append(o.deterministic) or forward(t, o))
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            sdpa(*_leaves(), torch.ones(1, 1, 5, 5, dtype=torch.bool))
        finally:
            torch.use_deterministic_algorithms(False)
    assert given == [False, True]


def test_memory_that_runs_out_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(*_: Any) -> Any:
        calls.append(1)
        raise torch.OutOfMemoryError("out")

    monkeypatch.setattr(masked, "apply_attention", full)
    with pytest.raises(torch.OutOfMemoryError):
        sdpa(*_leaves(), torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert len(calls) == 1
