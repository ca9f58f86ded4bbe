"""What arguments may be: numbers, flags, tensors, their dtypes; and refusals in the caller's own words.

A tensor is no number where a gradient would get lost in it, and a bool is no number at all.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import Options
from .private import jit_is_tracing


def described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a {type(x).__name__} of dtype {x.dtype} and shape {tuple(x.shape)}"
    return "None" if x is None else f"{x!r} ({type(x).__name__})"


def number(name: str, x: Any) -> float:
    """`x` as a float: Python's, numpy's and symbolic numbers and, as in torch, tensors of no dimensions.

    Raises:
        TypeError: x is anything else, a bool, or a tensor that is differentiated.
    """
    if type(x) is float:
        return x
    if isinstance(x, Tensor):
        return _read(name, x)
    if isinstance(x, torch.SymFloat):
        return x  # type: ignore[return-value]
    if isinstance(x, torch.SymInt):
        return torch.sym_float(x)  # type: ignore[return-value]
    if _is_traced_numpy(x):
        return float(x)
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be a number, but is {described(x)}")
    return float(x)


def _is_traced_numpy(x: Any) -> bool:
    """Whether it may be a number of numpy's, which are arrays to Dynamo."""
    return torch.compiler.is_compiling() and type(x).__module__ == "numpy"


def optional_number(name: str, x: Any) -> float | None:
    return None if x is None else number(name, x)


def integer(name: str, x: Any) -> int:
    """`x` as an int: Python's, numpy's and symbolic ones.

    Raises:
        TypeError: x is anything else, such as a float with an integral value, a bool or a tensor.
    """
    if type(x) is int:
        return x
    if isinstance(x, torch.SymInt) or (isinstance(x, Tensor) and jit_is_tracing()):  # there sizes are tensors
        return x  # type: ignore[return-value]
    if _is_traced_numpy(x):
        return x  # which the op reads: in one graph int(x) cannot be
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise TypeError(f"{name} must be an int, but is {described(x)}")
    return int(x)


def flag(name: str, x: Any) -> bool:
    """`x` as a bool: Python's or numpy's, or an int that is 0 or 1.

    Raises:
        TypeError: x is anything else, such as a tensor, None or a tuple given in its place.
    """
    if x is True or x is False:
        return x
    if type(x) is int and x in (0, 1):
        return bool(x)
    if type(x).__module__ == "numpy" and type(x).__name__ in ("bool", "bool_"):
        return bool(x)
    raise TypeError(f"{name} must be a bool, but is {described(x)}")


def tensor(name: str, x: Any) -> Tensor:
    """`x` itself.

    Raises:
        TypeError: x is no tensor.
        NotImplementedError: it is sparse.
    """
    if isinstance(x, Tensor):
        if x.layout != torch.strided and not x.is_nested:
            raise NotImplementedError(f"{name} must be strided, but its layout is {x.layout}: give {name}.to_dense()")
        return x
    made = f": make it one, torch.as_tensor({name})" if isinstance(x, (list, tuple)) else ""
    raise TypeError(f"{name} must be a Tensor, but is {described(x)}{made}")


def plain(name: str, x: Any) -> Tensor:
    """`x` itself.

    Raises:
        TypeError: x is no tensor.
        NotImplementedError: it is sparse or nested.
    """
    if tensor(name, x).is_nested:
        raise NotImplementedError(
            f"{name} must be a plain tensor, but is nested: give scaled_dot_product_attention the nested tensors, or "
            "flash_attn_varlen_func their values() and offsets()"
        )
    return x


def is_integral(x: Tensor) -> bool:
    """Whether it holds one integer."""
    return x.numel() == 1 and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dtype(name: str, x: Tensor) -> None:
    """Raises unless there are kernels for x's dtype: NotImplementedError if it is not integral, as in torch."""
    if x.dtype in DTYPES:
        return
    integral = not (x.dtype.is_floating_point or x.dtype.is_complex)
    remedy = "" if x.dtype.is_complex else f": convert it, {name}.to(torch.bfloat16)"
    error = RuntimeError if integral else NotImplementedError
    raise error(f"{name} must be float64, float32, bfloat16 or float16, but is {x.dtype}{remedy}")


def rename(error: Exception, names: dict[str, str]) -> None:
    """Puts the caller's names of arguments in place of the op's own into the text of `error`."""
    if torch.compiler.is_compiling():  # Dynamo would say that it can't trace this, and not what is wrong
        return
    if len(error.args) == 1 and isinstance(error.args[0], str):
        pattern = r"\b(" + "|".join(names) + r")\b"
        error.args = (re.sub(pattern, lambda match: names[match[0]], error.args[0]),)


_CHECKS: tuple[Callable[[str, Any], Any], ...] = tuple(
    {int: integer, float: number, float | None: optional_number, bool: flag}[kind]
    for kind in get_type_hints(Options).values()
)


def plain_options(options: Options) -> Options:
    """The options as numbers of the op's schema, which by itself would take any tensor for its value.

    Raises:
        TypeError: one of them is of another type; the text names it.
    """
    return Options(*(check(name, x) for check, name, x in zip(_CHECKS, Options._fields, options, strict=True)))


def _read(name: str, x: Tensor) -> float:
    if x.requires_grad or forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(
            f"{name} must be a number, but is a {type(x).__name__} that is differentiated, and no gradient would reach "
            f"it. Give {name}.item(); a scale that learns is multiplied with the queries instead"
        )
    if x.dim() != 0 or x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} must be a number, but is {described(x)}")
    return float(x)
