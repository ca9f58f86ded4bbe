"""Everything of torch's without a public name that this package uses, and what serves where a name is gone.

Names are looked up once, at import: a call of what is found costs no more than a call of torch's own name.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # the name that its users are told

Function = TypeVar("Function", bound=Callable[..., Any])


def _below_autograd() -> Callable[[], AbstractContextManager[None]]:
    if guard := getattr(torch._C, "_AutoDispatchBelowAutograd", None):
        return cast(Callable[[], AbstractContextManager[None]], guard)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradOther)
    for device in ("CPU", "CUDA", "Meta", "NestedTensor", "PrivateUse1"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autograd{device}"))
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


below_autograd = _below_autograd()
"""A context in which ops run without their autograd kernels."""


def _without_autocast() -> Callable[[], AbstractContextManager[Any]]:
    if guard := getattr(torch._C, "_DisableAutocast", None):
        return cast(Callable[[], AbstractContextManager[Any]], guard)

    @contextlib.contextmanager
    def off() -> Iterator[None]:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield

    return off


without_autocast = _without_autocast()
"""A context in which ops are called with the dtypes that they are given."""

without_torch_function: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "DisableTorchFunction", contextlib.nullcontext
)
"""A context in which neither subclasses nor modes override torch functions."""


def apply_of(function: Any) -> Callable[..., Any]:
    """What `function.apply` ends in when no function transform is active; the way there costs more than a small kernel.

    For use outside of function transforms, or, of a `SingleLevelFunction`, in a `single_level()` of them.
    """
    if not issubclass(function, torch.autograd.Function):
        return cast(Callable[..., Any], function.apply)
    return cast(Callable[..., Any], getattr(super(torch.autograd.Function, function), "apply", function.apply))


def _single_level_function() -> Any:
    base: Any = getattr(torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function)
    key: Any = getattr(torch.autograd.Function, "_compiled_autograd_key", None)
    if key is None or hasattr(base, "_compiled_autograd_key"):
        return base
    return type(base)("SingleLevelFunction", (base,), {"_compiled_autograd_key": staticmethod(key)})


SingleLevelFunction = _single_level_function()
"""What a `torch.autograd.Function` is derived from that is applied at one level of function transforms. From torch 2.14
on a Function itself is handed to all levels, whoever applies it."""


def _switched_on(get: Callable[[], bool], put: Callable[[bool], None]) -> Callable[[], AbstractContextManager[None]]:
    @contextlib.contextmanager
    def on() -> Iterator[None]:
        before = get()
        put(True)
        try:
            yield
        finally:
            put(before)

    return on


def _single_level() -> Callable[[], AbstractContextManager[None]]:
    try:
        from torch._functorch.utils import enable_single_level_autograd_function
    except ImportError:
        functorch = torch._C._functorch
        return _switched_on(
            functorch.get_single_level_autograd_function_allowed, functorch.set_single_level_autograd_function_allowed
        )
    return enable_single_level_autograd_function


single_level = _single_level()
"""A context in which what `apply_of` returns may be called although function transforms are active: a kernel under the
Autograd key does so, and is called once for each level of them."""


def _forward_mode_enabled() -> Callable[[], AbstractContextManager[Any]]:
    if context := getattr(forward_ad, "_set_fwd_grad_enabled", None):
        return functools.partial(context, True)
    return _switched_on(torch._C._is_fwd_grad_enabled, torch._C._set_fwd_grad_enabled)


forward_mode_enabled = _forward_mode_enabled()
"""A context in which ops compute tangents, as `torch.enable_grad()` for gradients."""


def _transforms_active() -> Callable[[], bool]:
    functorch: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
    if functorch is None or not hasattr(forward_ad, "_current_level"):
        return lambda: True
    return lambda: functorch() or forward_ad._current_level >= 0


transforms_active = _transforms_active()
"""Whether vmap, func.grad and the like, or a level of forward-mode derivatives, may see a call. True where torch does
not say: then all calls take the way that is right for any of them."""

jit_is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)
"""Whether torch.jit.trace runs. The public name takes twice as long to say so."""


class Watchers(NamedTuple):
    """What may look at which ops a call makes. It does where a function says so, or where an attribute has another
    value, (attributes of its object, name, value)."""

    functions: tuple[Callable[[], object], ...]
    at_rest: tuple[tuple[dict[str, Any], str, object], ...]


def _watchers() -> Watchers:
    modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)
    functorch: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
    included: Callable[[Any], bool] | None = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", None)
    if modes is None or functorch is None or included is None or not hasattr(forward_ad, "_current_level"):
        return Watchers((lambda: True,), ())
    functions = modes, functorch, jit_is_tracing
    tangents = vars(forward_ad), "_current_level", -1
    # make_fx(pre_dispatch=True) is no dispatch mode. Its modes, of all threads, are known in less time than the key.
    state: Any = getattr(torch._ops, "_mode_stack_state_for_pre_dispatch", None)
    name = "_ModeStackStateForPreDispatch__infra_modes"
    before: Any = getattr(state, name, None)
    if isinstance(before, list) and hasattr(state, "_schema_check_mode"):
        none = [None] * len(before)
        return Watchers(functions, ((vars(state), name, none), (vars(state), "_schema_check_mode", None), tangents))
    key = torch._C.DispatchKey.PreDispatch
    return Watchers((*functions, lambda: included(key)), (tangents,))


watchers = _watchers()
"""A TorchDispatchMode, a transform, torch.jit.trace, make_fx. The compiler is asked for by its public name. Always true
where torch does not say."""


def ops_are_watched() -> bool:
    """Whether anything may look at which ops a call makes."""
    return any(is_watching() for is_watching in watchers.functions) or any(
        attributes[name] != value for attributes, name, value in watchers.at_rest
    )


def _any_autocast() -> Callable[[], bool]:
    if asked := getattr(torch._C, "_is_any_autocast_enabled", None):
        return cast(Callable[[], bool], asked)
    return lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


any_autocast = _any_autocast()
"""Whether autocast is on for any device, asked in half the time of the question for one of them."""


is_traced = torch.compiler.is_dynamo_compiling
"""Whether Dynamo reads this. `torch.compiler.is_compiling()`, which takes twice as long, is true of other tracers too:
those watch ops."""

is_deterministic: Callable[[], bool] = getattr(
    torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)
"""What `torch.are_deterministic_algorithms_enabled()` says, in a third of its time."""


def past_torch_function(op: Any) -> Callable[..., Any]:
    """`op` for arguments of which none overrides torch functions, outside of modes that do: the search for those costs
    more than a small kernel. The op itself where torch has no such way."""
    call, handle = getattr(torch._C, "_dispatch_call_boxed", None), getattr(op, "_handle", None)
    return op if call is None or handle is None else functools.partial(call, handle)


def has_kernel(op: str, key: str) -> bool:
    """Whether an op of torch's own has a kernel for a device, or for another dispatch key. True where torch doesn't
    say."""
    has: Callable[[str, str], bool] | None = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    return has is None or has(f"aten::{op}", key)


def changed_ops(schemas: Mapping[str, str]) -> list[str]:
    """Those of torch's own ops that have other schemas than these, or that it does not have."""
    schema: Callable[[str, str], Any] | None = getattr(torch._C, "_get_schema", None)

    def is_known(name: str, expected: str) -> bool:
        try:
            return schema is not None and str(schema(f"aten::{name}", "")) == f"aten::{name}{expected}"
        except RuntimeError:  # there is no such op
            return False

    return [name for name, expected in schemas.items() if not is_known(name, expected)]


def is_free(schemas: Mapping[str, str], device: str) -> bool:
    """Whether torch has ops of its own with these names and schemas, and no kernel of theirs for the device."""
    return not changed_ops(schemas) and not any(has_kernel(name, device) for name in schemas)


flash_sdp_enabled: Callable[[], bool] = getattr(
    torch._C, "_get_flash_sdp_enabled", torch.backends.cuda.flash_sdp_enabled
)
"""Whether `torch.nn.attention.sdpa_kernel` lets FLASH_ATTENTION take part. Dynamo can't trace the public name."""

sdp_priority: Callable[[], list[int]] = getattr(torch._C, "_get_sdp_priority_order", list)
"""torch's kernels for attention, `int(SDPBackend)`, in the order in which it tries them. Empty where it doesn't say."""

torch_sdpa: Callable[..., Tensor] = getattr(
    torch._C._nn, "scaled_dot_product_attention", F.scaled_dot_product_attention
)
"""Torch's own function, also where something else already stands in its public place."""


def register_as_builtin(function: Callable[..., Any], op: str) -> None:
    """TorchScript then compiles a call of `function`, which must live for ever, as one of `op`. Without the name it
    says that it can't compile it."""
    if register := getattr(torch.jit._builtins, "_register_builtin", None):
        register(function, op)


def constant_when_traced(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does, which would load the compiler: Dynamo calls the function while
    it traces, and keeps to the result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _Handed:
    """What a thread hands to autograd's threads."""

    __slots__ = ("context",)
    context: Context


def _caller_of_backward() -> tuple[Callable[[], Context | None], Callable[[], None]]:
    nobody: Callable[[], Any] = lambda: None  # noqa: E731
    has: Callable[[str], bool] | None = getattr(torch._C, "_is_key_in_tls", None)
    get: Callable[[str], Any] | None = getattr(torch._C, "_get_obj_in_tls", None)
    put: Callable[[str, Any], None] | None = getattr(torch._C, "_stash_obj_in_tls", None)
    if has is None or get is None:
        return nobody, nobody
    if hasattr(torch.autograd.graph, "contextvars"):  # torch hands on the context itself
        return (lambda: get("context") if has("context") else None), nobody
    in_backward: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
    if put is None or in_backward is None:
        return nobody, nobody
    key, own = "flash_attn", threading.local()

    def hand_on() -> None:
        handed: _Handed | None = getattr(own, "handed", None)
        if handed is None:
            handed = own.handed = _Handed()
        handed.context = copy_context()
        if not (has(key) and get(key) is handed):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(handed))  # torch 2.11 gives back a reference it has not taken
            put(key, handed)

    return (lambda: get(key).context if in_backward() != -1 and has(key) else None), hand_on


caller_of_backward, hand_on_context = _caller_of_backward()
"""`caller_of_backward()`: in a backward pass, in whichever of autograd's threads, the context variables of whoever
called it. None elsewhere, and where torch doesn't say.

`hand_on_context()`: to be called where variables were set that backward passes are to know: torch 2.11 hands on none by
itself. Of several async tasks of a thread, it then hands on the variables of the one that called this last."""


def compiler_is_loaded() -> bool:
    """Whether anything can have been compiled so far. Asking torch.compiler itself would load the compiler."""
    return "torch._dynamo" in sys.modules or importlib.util.find_spec("torch._dynamo") is None


def ragged_dim(x: Tensor) -> int:
    """The dimension of a jagged nested tensor whose size differs from entry to entry."""
    dim = getattr(x, "_ragged_idx", None)
    return next(i for i, n in enumerate(x.shape) if not isinstance(n, int)) if dim is None else cast(int, dim)


def longest(x: Any) -> int:
    """The longest entry of a jagged tensor without holes. Waits for the device unless the tensor remembers it."""
    remembered = getattr(x, "_get_max_seqlen", None)
    if remembered is not None:
        return int(remembered())
    return int(x.offsets().diff().max()) if x.offsets().numel() > 1 else 0


older_vmap: bool = all(hasattr(torch, n) for n in ("_add_batch_dim", "_remove_batch_dim")) and all(
    hasattr(torch._C, n) for n in ("_vmapmode_increment_nesting", "_vmapmode_decrement_nesting")
)
"""Whether torch still has the vmap before functorch's, which `torch.autograd.grad(..., is_grads_batched=True)` uses."""


def unwrap_batched(arguments: Sequence[Any]) -> tuple[int, int, list[int | None], list[Any]]:
    """Takes the innermost mapped dimension off the arguments of an op that the older vmap calls.

    Returns:
        The level of that vmap, the dimension's size, where it is in each argument (None if not mapped), the arguments.
    """
    torch._C._vmapmode_increment_nesting()
    nesting = torch._C._vmapmode_decrement_nesting()
    # Autograd's threads, in which backward passes on GPUs run, are not told of it.
    for level in range(nesting or _MOST_LEVELS, 0, -1):
        mapped = [isinstance(x, Tensor) and _is_mapped(x, level) for x in arguments]
        if any(mapped):
            plain = [
                torch._remove_batch_dim(x, level, 1, 0) if m else x for x, m in zip(arguments, mapped, strict=True)
            ]
            size = next(x.shape[0] for x, m in zip(plain, mapped, strict=True) if m)
            return level, size, [0 if m else None for m in mapped], plain
    raise AssertionError("a kernel for mapped tensors was called without one")


_MOST_LEVELS = 64
_may_be_mapped: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: True)


def _is_mapped(x: Tensor, level: int) -> bool:
    """A tensor that is not mapped is given as many copies as one asks for."""
    if not _may_be_mapped(x):
        return False
    one, two = (torch._remove_batch_dim(x, level, n, 0).shape[0] for n in (1, 2))
    return bool(one == two)


def wrap_batched(
    results: tuple[Tensor | None, ...], dims: tuple[int | None, ...], level: int
) -> tuple[Tensor | None, ...]:
    """The results of an op, mapped over `dims` by the older vmap's `level`."""
    return tuple(
        x if x is None or dim is None else torch._add_batch_dim(x, dim, level)
        for x, dim in zip(results, dims, strict=True)
    )


def is_known(n: Any) -> bool:
    """Whether a number has a value before the ops run: of a symbol, that in the example which is traced."""
    if not isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    node: Any = getattr(n, "node", None)
    return hasattr(node, "has_hint") and bool(node.has_hint())


def example_value(n: Any) -> Any:
    """The value of a number that is known. Unlike its comparison with others, this puts no condition on symbols."""
    return n.node.hint if isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)) else n


def typical_value(n: int) -> int:
    """The value of a size or stride to compare with others. Sizes known only at run time count as large ones, which
    orders the strides of dense tensors as any size over 1 does, and where it is at most 1 no order matters."""
    if is_known(n):
        return cast(int, example_value(n))
    node = getattr(n, "node", None)
    expression, environment = getattr(node, "expr", None), getattr(node, "shape_env", None)
    if expression is None:
        return _LARGE
    name = "backed_var_to_val" if hasattr(environment, "backed_var_to_val") else "var_to_val"
    hints = getattr(environment, name, {})
    return int(expression.xreplace({symbol: hints.get(symbol, _LARGE) for symbol in expression.free_symbols}))


_LARGE = 1 << 20
