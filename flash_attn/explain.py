"""What a call would run: the kernel, its tile, why faster ones did not take it, and the memory it needs."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .masks import packed_mask
from .masks.prepared import TileShares, shares_of
from .sdpa.attention import scaled_dot_product_attention
from .torch_op import checks
from .torch_op.arguments import NUM_DIFFERENTIABLE, BackwardArguments, Options, Tensors
from .torch_op.cache import Attend
from .torch_op.library import empty_outputs
from .torch_op.observer import Observer


@dataclass(frozen=True)
class KernelChoice:
    """One pass of a call.

    Attributes:
        family: folder of `csrc/` that holds the kernel: cpu, universal, sm80, decode or sm90.
        kernel: the variant.
        tile: (query rows, key rows) a step.
        workspace_bytes: scratch memory while the pass runs.
        decisions: what the planner decided beyond that, by name: how tiles are shared out, in which order, how sums
            come together. Not part of the API: names change with the kernels.
        rejected: faster families, and why each did not take the problem.
    """

    family: str
    kernel: str
    tile: tuple[int, int]
    workspace_bytes: int
    decisions: dict[str, int | str]
    rejected: list[tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"{self.family}: {self.kernel}, tile {self.tile[0]} x {self.tile[1]}, workspace {self._workspace()}"]
        if self.decisions:
            lines.append(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.decisions.items()))
        lines += [f"not {family}: {reason}" for family, reason in self.rejected]
        return "\n           ".join(lines)

    def _workspace(self) -> str:
        return _bytes(self.workspace_bytes)


@dataclass(frozen=True)
class MaskUse:
    """What attn_mask costs and saves.

    Attributes:
        shares: of its scores, by the class of the 128 x 128 tile that they lie in: skip, full, partial, biased.
        prepared: by `prepare_mask`.
        read_bytes: that a pass which classes the mask reads for it; 0 if prepared.
        packed_bytes: bits and classes: scratch of such a pass, or what the prepared mask holds.
    """

    shares: TileShares
    prepared: bool
    read_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares._asdict().items())
        cost = "prepared: nothing is read to class it" if self.prepared else f"classing reads {_bytes(self.read_bytes)}"
        return f"{shares} of its 128 x 128 tiles; {cost}, bits and classes take {_bytes(self.packed_bytes)}"


@dataclass(frozen=True)
class Call:
    """One call of the attention op.

    Attributes:
        problem: shapes and options, in words.
        forward: the kernel of the forward pass.
        backward: the kernel of the backward pass; None if nothing requires grad.
        output_bytes: out and lse.
        saved_bytes: what autograd keeps beside the inputs; 0 if nothing requires grad.
        copies: inputs that are copied first, and why.
        mask: what attn_mask costs and saves; None without one, or if it has no data.
    """

    problem: str
    forward: KernelChoice
    backward: KernelChoice | None
    output_bytes: int
    saved_bytes: int
    copies: list[str] = field(default_factory=list)
    mask: MaskUse | None = None

    def __str__(self) -> str:
        lines = [self.problem, f"  forward  {self.forward}"]
        if self.backward is not None:
            lines.append(f"  backward {self.backward}")
        lines.append(
            f"  memory   {_bytes(self.output_bytes)} for out and lse, {_bytes(self.saved_bytes)} kept for backward"
        )
        if self.mask is not None:
            lines.append(f"  mask     {self.mask}")
        lines += [f"  copy     {text}" for text in self.copies]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The calls of the op that a function makes; printing it explains each.

    Attributes:
        calls: in the order in which their forward passes run; a backward pass alone, whose forward pass ran before,
            is a call of its own. Empty if torch's own function would run, as on other devices.
        torch_ops: torch's own attention kernels that ran, by name, once for each call.
    """

    calls: list[Call]
    torch_ops: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(call) for call in self.calls]
        if not lines:
            lines.append("no call of flash_attn: torch's own function runs")
            if not self.torch_ops:
                lines[0] += (
                    ", or a CUDA graph that was captured before, which can't be looked into, or none at all"
                    " (of torch's kernels, MATH can't be told from other matrix products)"
                )
        lines += [f"{count} x torch's own {name}" for name, count in Counter(self.torch_ops).items()]
        return "\n".join(lines)


def explain(function: Callable[..., Any] | Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Says which kernels `function(*args, **kwargs)` would run, without running them.

    Args:
        function: any function or module that ends in this package's attention: `scaled_dot_product_attention`,
            `flash_attn_func`, a `FlashMHA`, a whole model, a training step, under function transforms or compiled.
            Meanwhile what is compiled runs uncompiled, attention returns zeros, has zero gradients and draws no
            dropout; all else is computed. If it is a tensor, it is the query of `scaled_dot_product_attention`.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        What each call of the op would do; `print` it, or read its fields. Kernels in a CUDA graph that was captured
        before are not seen.

    Raises:
        TypeError: function is neither.
        RuntimeError: the call would be refused, with the text of that refusal; or the function makes a
            `torch.nn.attention.bias.CausalBias`, which torch can't do while ops are observed: make it before.

    Example:
        >>> print(flash_attn.explain(q, k, v, is_causal=True))
    """
    if not (isinstance(function, Tensor) or callable(function)):
        raise TypeError(f"function must be callable, or a tensor, the query, but is {checks.described(function)}")
    calls: list[_Seen | _SeenCache] = []

    def on_forward(tensors: Tensors, options: Options) -> _Seen:
        call = _Seen(tensors, options)
        calls.append(call)
        return call

    def on_trained(call: _Seen) -> None:
        call.train()

    def on_backward(arguments: BackwardArguments) -> None:
        seen = _Seen(arguments.tensors, arguments.options)
        waiting = [c for c in calls if isinstance(c, _Seen) and c.awaits_backward_of(seen)] or [seen]
        # Under function transforms no output is known to require grad.
        call = next((call for call in waiting if call.explanation.backward is not None), waiting[0])
        if call is seen:
            calls.append(seen)
        call.train(arguments.needs)
        call.had_backward = True

    def on_cache(arguments: Attend) -> None:
        calls.append(_SeenCache(arguments))

    with Observer(on_forward, on_trained, on_backward, on_cache) as observer:
        try:
            if isinstance(function, Tensor):
                scaled_dot_product_attention(function, *args, **kwargs)
            else:
                function(*args, **kwargs)
        except RuntimeError as error:
            if "Creating a new Tensor subclass" not in str(error):
                raise
            raise RuntimeError(
                f"{error}. While attention is explained no CausalBias can be made: make it before"
            ) from None
    return Explanation([call.explanation for call in calls], observer.torch_ops)


class _Seen:
    """A call as it is seen: whether it trains is known only later. Keeps no tensor alive."""

    def __init__(self, tensors: Tensors, options: Options) -> None:
        given = {name: x for name, x in tensors._asdict().items() if x is not None}
        self._copies = []
        for name, x in given.items():
            if name != "attn_mask" and x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
                self._copies.append(f"{name}, because its last stride is {x.stride(-1)} and not 1")
                given[name] = x.contiguous()
        self._wants = [x is not None and x.requires_grad for x in tensors[:NUM_DIFFERENTIABLE]]
        self._given = {name: _describe(x) for name, x in given.items()}
        self._options = options
        self._problem = _problem(given, options)
        outputs = empty_outputs(
            given["q"].to("meta"), given["v"].to("meta"), options.heads_first, "cu_seqlens_q" in given
        )
        self._output_bytes = sum(x.numel() * x.element_size() for x in outputs)
        self._mask = _mask_use(tensors)
        self.had_backward = False
        self.explanation = self._explain([False] * NUM_DIFFERENTIABLE)

    def train(self, needs: Sequence[bool] | None = None) -> None:
        self.explanation = self._explain(self._wants if needs is None else needs)

    def awaits_backward_of(self, other: _Seen) -> bool:
        return not self.had_backward and self._problem == other._problem

    def _explain(self, needs: Sequence[bool]) -> Call:
        _C = importlib.import_module("flash_attn._C")  # belongs to one Python version, which the op library does not

        plans = _C.plan(self._given, self._options._asdict(), list(needs))
        trains = any(needs)
        return Call(
            problem=self._problem,
            forward=KernelChoice(**plans["forward"]),
            backward=KernelChoice(**plans["backward"]) if trains else None,
            output_bytes=self._output_bytes,
            saved_bytes=self._output_bytes if trains else 0,
            copies=self._copies,
            mask=self._mask,
        )


class _SeenCache:
    """A call of attention over a cache, which has no backward pass."""

    def __init__(self, arguments: Attend) -> None:
        _C = importlib.import_module("flash_attn._C")

        given = {name: x for name, x in arguments._asdict().items() if isinstance(x, Tensor)}
        options = {name: x for name, x in arguments._asdict().items() if not isinstance(x, Tensor)}
        q = given["q"]
        copies = []
        if q.shape[-1] > 1 and q.stride(-1) != 1:
            copies = [f"q, because its last stride is {q.stride(-1)} and not 1"]
            given["q"] = q.contiguous()
        plan = _C.plan_cache({name: _describe(x) for name, x in given.items()}, options)
        if (gathered := plan.pop("copied_bytes", 0)) > 0:
            copies.append(
                f"keys and values of the cache, {_bytes(gathered)} of rows that follow each other, because kernels for"
                " many query rows do not read them where they lie"
            )
        outputs = empty_outputs(q.to("meta"), given["v_cache"].to("meta"), False, "cu_seqlens_q" in given)
        parts = [f"{name} {tuple(x.shape)}" for name, x in given.items()]
        self.explanation = Call(
            problem=f"{str(q.dtype).removeprefix('torch.')} on {q.device}: " + ", ".join(parts),
            forward=KernelChoice(**plan),
            backward=None,
            output_bytes=sum(x.numel() * x.element_size() for x in outputs),
            saved_bytes=0,
            copies=copies,
        )


def _mask_use(tensors: Tensors) -> MaskUse | None:
    mask, packed = tensors.attn_mask, tensors.packed_mask
    if mask is None or not _has_storage(mask):
        return None
    prepared = packed is not None
    if packed is None:
        mask = packed_mask.own(mask.detach())
        packed = packed_mask.pack(mask)
    return MaskUse(
        shares=shares_of(packed, mask.shape),
        prepared=prepared,
        read_bytes=0 if prepared else mask.numel() * mask.element_size(),
        packed_bytes=packed.numel() * packed.element_size(),
    )


def _has_storage(x: Tensor) -> bool:
    return type(x) in (Tensor, Parameter) and not x.is_meta


def _describe(x: Tensor) -> tuple[int, str, int, list[int], list[int]]:
    """As csrc/bindings.cpp takes it. Tensors without storage, meta and fake ones, count as well aligned."""
    address = x.data_ptr() if _has_storage(x) else 0
    device = x.get_device() if x.is_cuda else -1
    return (address or 1 << 20, str(x.dtype).removeprefix("torch."), device, list(x.shape), list(x.stride()))


def _problem(given: dict[str, Tensor], options: Options) -> str:
    q = given["q"]
    parts = [f"{name} {tuple(x.shape)}" for name, x in given.items()]
    defaults = {
        "softmax_scale": None,
        "causal": 0,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "dropout_p": 0.0,
    }
    parts += [f"{name} {value}" for name, value in options._asdict().items() if value != defaults.get(name, value)]
    return f"{str(q.dtype).removeprefix('torch.')} on {q.device}: " + ", ".join(parts)


def _bytes(count: int) -> str:
    return (
        f"{count} B"
        if count < 1 << 10
        else f"{count / (1 << 10):.1f} KiB"
        if count < 1 << 20
        else f"{count / (1 << 20):.1f} MiB"
    )
