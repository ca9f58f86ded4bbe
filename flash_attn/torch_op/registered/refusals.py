"""The op's refusals where it does not run: of meta and fake tensors, made by the checks of the op itself.

The checks are C++ (csrc/ops/arguments/arguments.cpp) and take plain numbers. Where sizes are symbols they get those of
the example that is traced, and put no condition on others: the op checks again when it runs. Sizes known only then are
not checked before. Nor is anything under a Python that `flash_attn._C` was not built for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import private
from ..arguments import BackwardArguments, BackwardJvpArguments, ForwardJvpArguments, Options, Tangents, Tensors

_Described = tuple[int, str, int, list[int], list[int]]  # as csrc/bindings.cpp takes a tensor

_SOME_ADDRESS = 1 << 20  # aligned, and not null, which would say that a tensor is not given
_CPU, _META = -1, -2


class _KnownLater(Exception):  # noqa: N818 - no error
    """A number has no value before the op runs."""


@functools.cache
def _introspection() -> Any:
    try:
        return importlib.import_module("flash_attn._C")
    except ImportError:
        return None


def refuse_forward(tensors: Tensors, options: Options) -> None:
    """Raises what forward would raise."""
    _check("check", tensors._asdict(), options._asdict())


def refuse_backward(arguments: BackwardArguments) -> None:
    """Raises what backward would raise."""
    dout, dlse, tensors, out, lse, needs, options = arguments
    saved = {"dout": dout, "dlse": dlse, "out": out, "lse": lse}
    _check("check", tensors._asdict() | saved, options._asdict(), needs)


def refuse_forward_jvp(arguments: ForwardJvpArguments) -> None:
    """Raises where forward would raise, or tangents are not as their tensors."""
    refuse_forward(arguments.tensors, arguments.options)
    _check_tangents(arguments.tangents, arguments.tensors)


def refuse_backward_jvp(given: BackwardJvpArguments) -> None:
    """The same where backward would raise."""
    refuse_backward(
        BackwardArguments(given.dout, given.dlse, given.tensors, given.out, given.lse, given.needs, given.options)
    )
    _check_tangents(given.tangents, given.tensors)


def _check_tangents(t: Tangents, tensors: Tensors) -> None:
    for (name, tangent), x in zip(t._asdict().items(), tensors, strict=False):
        if tangent is not None and (x is None or tangent.shape != x.shape or tangent.dtype != x.dtype):
            expected = "None" if x is None else f"{x.dtype} of shape {tuple(x.shape)}"
            raise RuntimeError(
                f"the tangent of {name} must be as {name}, {expected}, but is {tangent.dtype} of shape "
                f"{tuple(tangent.shape)}"
            )


def refuse_named(check: str, arguments: Mapping[str, Any]) -> None:
    """Raises what an op with these arguments would raise; `check` is what `flash_attn._C` has for it."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    _check(check, tensors, {name: x for name, x in arguments.items() if name not in tensors})


def _check(
    check: str, tensors: Mapping[str, Tensor | None], options: Mapping[str, Any], needs: Sequence[bool] | None = None
) -> None:
    module = _introspection()
    if module is None:
        return
    try:
        described = {name: _describe(x) for name, x in tensors.items() if x is not None}
        numbers = {name: _number(x) for name, x in options.items()}
    except _KnownLater:
        return
    getattr(module, check)(described, numbers, *(() if needs is None else (list(needs),)))


def _describe(x: Tensor) -> _Described:
    device = x.device.index or 0 if x.device.type == "cuda" else _META if x.device.type == "meta" else _CPU
    sizes, strides = ([_number(n) for n in numbers] for numbers in (x.shape, x.stride()))
    return _SOME_ADDRESS, str(x.dtype).removeprefix("torch."), device, sizes, strides


def _number(n: Any) -> Any:
    if not private.is_known(n):
        raise _KnownLater
    return private.example_value(n)
