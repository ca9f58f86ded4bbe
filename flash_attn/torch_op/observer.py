"""Calls of the ops that are seen instead of made, whichever way they come: eager, under transforms, from a graph."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import extension
from .arguments import BackwardArguments, Options, Tensors, split_backward, split_forward
from .attention import RNG_STATE_RANGE
from .cache import AppendAndAttend, Attend, append_and_attend_op, attend_cache_op
from .library import backward_op, forward_op
from .private import TorchDispatchMode, compiler_is_loaded

T = TypeVar("T")


class _Uncompiled:
    """Compiled functions run uncompiled while anyone needs it: under a dispatch mode those in one graph would raise.

    What torch has for it belongs to the whole process, so the last to leave puts it back, whoever entered first.
    """

    def __init__(self) -> None:
        self._lock, self._needed = threading.Lock(), 0
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            self._needed += 1
            if self._stance is None and compiler_is_loaded():
                self._stance = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        with self._lock:
            self._needed -= 1
            if self._needed == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_uncompiled = _Uncompiled()


class Observer(TorchDispatchMode, Generic[T]):
    """While it is entered, the ops of this thread, and of the autograd threads that work for it, return zeros.

    A mode at the end of dispatch sees what every other way in comes down to, function transforms and compiled code
    included, and sees tensors that have storage. Compiled functions run uncompiled meanwhile, those of other threads
    too. Dropout draws nothing.

    Args:
        on_forward: called with the arguments of each forward pass; what it returns is put into `forwards`.
        on_trained: called with that as soon as the outputs of the call are known to require grad.
        on_backward: called with the arguments of each backward pass.
        on_cache: called with the arguments of each attention over a cache. Nothing is appended.

    Attributes:
        torch_ops: names of torch's own attention kernels, once for each call.
    """

    def __init__(
        self,
        on_forward: Callable[[Tensors, Options], T],
        on_trained: Callable[[T], None],
        on_backward: Callable[[BackwardArguments], None],
        on_cache: Callable[[Attend], None],
    ) -> None:
        super().__init__()
        self._on_cache = on_cache
        self._on_forward, self._on_trained, self._on_backward = on_forward, on_trained, on_backward
        self._undecided: list[tuple[weakref.ref[Tensor], T]] = []
        self.torch_ops: list[str] = []

    def __enter__(self) -> Observer[T]:
        _uncompiled.enter()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _uncompiled.leave()
        self._decide()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._decide()
        if op is forward_op:
            call = self._on_forward(*split_forward(args))
            results = _zeros(op, args)
            self._undecided.append((weakref.ref(results[0]), call))
            return results
        if op is backward_op:
            self._on_backward(split_backward(args))
            return _zeros(op, args)
        if extension.is_backward(op, args):
            args = extension.of_backward(*args, **(kwargs or {}))
            self._on_backward(split_backward(args))
            return _zeros(backward_op, args)[:4]
        if op is attend_cache_op or op is append_and_attend_op:
            self._on_cache(Attend(*args) if op is attend_cache_op else AppendAndAttend(*args).attention())
            return _zeros(op, args)
        if op is torch.ops.aten.randint.low and tuple(args[:2]) == RNG_STATE_RANGE:
            return torch.zeros(args[2], **{"dtype": torch.int64, **(kwargs or {})})
        if op.namespace == "aten" and _attends(op.__name__):
            self.torch_ops.append(str(op))
        return op(*args, **(kwargs or {}))

    def _decide(self) -> None:
        """Autograd knows the outputs only after the op has returned, so each later op looks whether it does."""
        if self._undecided:
            left = []
            for out, call in self._undecided:
                x = out()
                if x is not None and x.requires_grad:
                    self._on_trained(call)
                elif x is not None:
                    left.append((out, call))
            self._undecided = left


def _attends(name: str) -> bool:
    forward = "attention" in name or name.startswith(("_transformer_encoder_layer_fwd", "_native_multi_head"))
    return forward and "backward" not in name and not name.startswith("_fused_sdp_choice")


def _zeros(op: Any, arguments: tuple[Any, ...]) -> Any:
    """Results of `op` as its fake kernel describes them."""
    q = next(x for x in arguments if isinstance(x, Tensor))

    def to_meta(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return x

    results = op(*map(to_meta, arguments))
    return tuple(
        None if x is None else q.new_empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_() for x in results
    )
