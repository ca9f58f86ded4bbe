"""The implementations that are measured, each turned into a call without arguments for one problem."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from shapes import Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATH_LIMIT = 2 << 30  # bytes of scores beyond which torch's math path is left out


class Inputs:
    """The tensors of one problem, shared by all backends."""

    def __init__(self, problem: Problem, device: torch.device, seed: int = 0) -> None:
        self.problem, self.device = problem, device
        generator = torch.Generator(device).manual_seed(seed)

        def random(heads: int, seqlen: int) -> Tensor:
            rows = (problem.tokens,) if problem.lengths else (problem.batch, seqlen)
            shape = (*rows, heads, problem.head_dim)
            return torch.randn(shape, device=device, generator=generator).to(DTYPES[problem.dtype])

        # (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) when packed
        self.q, self.dout = (random(problem.heads, problem.seqlen) for _ in range(2))
        self.k, self.v = (random(problem.kv_heads, problem.keys) for _ in range(2))
        self.mask = self._mask(generator)
        if problem.lengths:
            starts = torch.tensor([0, *problem.lengths]).cumsum(0)
            self.cu_seqlens = starts.to(device, torch.int32)
            columns = torch.arange(problem.seqlen, device=device)
            self.valid = columns < torch.tensor(problem.lengths, device=device)[:, None]  # (batch, max_seqlen)

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        problem, n, device = self.problem, self.problem.seqlen, self.device
        if problem.mask == "padding":
            lengths = torch.tensor(problem.padded_lengths, device=device)
            return (torch.arange(n, device=device) < lengths[:, None])[:, None, None, :]
        if problem.mask == "documents":
            document = torch.arange(n, device=device) * 4 // n
            return (document[:, None] == document)[None, None]
        if problem.mask == "random":
            return torch.rand(1, 1, n, n, device=device, generator=generator) < 0.5
        if problem.mask in ("bias", "bias_gradient"):
            bias = torch.randn(1, problem.heads, n, n, device=device, generator=generator)
            return bias.to(DTYPES[problem.dtype]).requires_grad_(problem.mask == "bias_gradient")
        return None

    def dense_mask(self) -> Tensor | None:
        """The mask, or window and lengths as one, for an implementation that has neither windows nor packed input."""
        p = self.problem
        if not p.lengths and p.window < 0:
            return self.mask
        causal = torch.ones(p.seqlen, p.seqlen, dtype=torch.bool, device=self.device).tril()
        if p.lengths:
            keep = self.valid[:, None, None, :]
            return keep & causal if p.causal else keep
        return causal.triu(-p.window)

    def pad(self, x: Tensor) -> Tensor:
        """(tokens, heads, head_dim) to (batch, max_seqlen, heads, head_dim) with zeros."""
        padded = x.new_zeros(*self.valid.shape, *x.shape[1:])
        padded[self.valid] = x
        return padded


@dataclass
class Contender:
    """One backend on one problem.

    Attributes:
        call: the forward pass of `leaves`.
        leaves: q, k, v, and the mask if its gradient is wanted, all requiring grad.
        dout: the gradient of the result, in its layout.
        common: brings a result or a gradient into the layout of `Inputs`.
        context: to be entered around every call.
    """

    name: str
    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    dout: Tensor
    common: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self) -> Tensor:
        return self.call()

    def entered(self, grad: bool) -> ExitStack:
        """The context of a call, with gradients or without."""
        stack = ExitStack()
        stack.enter_context(self.context())
        stack.enter_context(torch.set_grad_enabled(grad))
        return stack


class UnsuitedError(Exception):
    """This backend cannot, or need not, run this problem."""


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _contender(name: str, inputs: Inputs, layout: str, attention: Attention, **settings: object) -> Contender:
    """Makes leaves in the layout that `attention` takes: "as given", or "heads first", which pads packed sequences."""

    def change(x: Tensor) -> Tensor:
        if layout == "as given":
            return x
        return (inputs.pad(x) if inputs.problem.lengths else x).transpose(1, 2)

    def common(x: Tensor) -> Tensor:
        if layout == "as given":
            return x
        return x.transpose(1, 2)[inputs.valid] if inputs.problem.lengths else x.transpose(1, 2)

    q, k, v = (change(x).detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    bias = (inputs.mask,) if inputs.mask is not None and inputs.mask.requires_grad else ()
    leaves, dout = (q, k, v, *bias), change(inputs.dout)
    return Contender(name, lambda: attention(q, k, v), leaves, dout, common, **settings)  # type: ignore[arg-type]


def ours(inputs: Inputs) -> Contender:
    """This package, by the public function that fits."""
    p = inputs.problem
    if p.lengths:
        cu = inputs.cu_seqlens
        return _contender(
            "ours",
            inputs,
            "as given",
            lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, p.seqlen, p.seqlen, causal=p.causal),
        )
    if p.window >= 0:
        return _contender(
            "ours",
            inputs,
            "as given",
            lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(p.window, 0)),
        )
    return _contender(
        "ours", inputs, "heads first", _sdpa(flash_attn.scaled_dot_product_attention, inputs, inputs.mask)
    )


def deterministic(inputs: Inputs) -> Contender:
    """This package with repeatable gradients."""
    p = inputs.problem
    if p.lengths or p.mask != "none":
        raise UnsuitedError("for dense problems without a mask")
    window = (p.window, 0) if p.window >= 0 else (-1, -1)
    return _contender(
        "deterministic",
        inputs,
        "as given",
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=p.causal, window_size=window, deterministic=True),
    )


def _sdpa(function: Callable[..., Tensor], inputs: Inputs, mask: Tensor | None) -> Attention:
    p = inputs.problem
    causal = p.causal and p.window < 0 and not p.lengths
    return lambda q, k, v: function(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=p.kv_heads != p.heads)


def _torch(backend: SDPBackend) -> Callable[[Inputs], Contender]:
    """One backend of torch's scaled_dot_product_attention, with dense masks for windows and packed sequences."""

    def build(inputs: Inputs) -> Contender:
        p = inputs.problem
        if inputs.device.type == "cpu" and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            raise UnsuitedError("not for the CPU")
        if p.lengths and p.batch * p.seqlen > 4 * p.tokens:
            raise UnsuitedError("padding would more than quadruple the tokens")
        scores = 4 * p.batch * p.heads * p.seqlen * p.keys
        if backend == SDPBackend.MATH and scores > MATH_LIMIT:
            raise UnsuitedError(f"its scores would take {scores / 2**30:.0f} GiB")
        function = _sdpa(F.scaled_dot_product_attention, inputs, inputs.dense_mask())
        return _contender(_TORCH_NAMES[backend], inputs, "heads first", function, context=lambda: sdpa_kernel(backend))

    return build


_TORCH_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}


def torch_varlen(inputs: Inputs) -> Contender:
    """`torch.nn.attention.varlen.varlen_attn`, FlashAttention 2 on packed sequences."""
    p = inputs.problem
    if not p.lengths or inputs.device.type == "cpu" or not importlib.util.find_spec("torch.nn.attention.varlen"):
        raise UnsuitedError("for packed sequences on CUDA only")
    from torch.nn.attention.varlen import varlen_attn

    named = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": p.causal} if "is_causal" in named else {"window_size": (-1, 0) if p.causal else (-1, -1)}
    cu = inputs.cu_seqlens
    return _contender(
        "torch_varlen",
        inputs,
        "as given",
        lambda q, k, v: varlen_attn(q, k, v, cu, cu, p.seqlen, p.seqlen, **causal),  # type: ignore[arg-type]
    )


def fa3(inputs: Inputs) -> Contender:
    """FlashAttention 3, if its `flash_attn_interface` is installed."""
    p = inputs.problem
    if inputs.device.type == "cpu" or not importlib.util.find_spec("flash_attn_interface"):
        raise UnsuitedError("not installed")
    if p.mask != "none" or p.dtype == "fp32":
        raise UnsuitedError("no masks, no fp32")
    import flash_attn_interface as interface

    window = (p.window, 0) if p.window >= 0 else (-1, -1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if p.lengths:
            cu = inputs.cu_seqlens
            out = interface.flash_attn_varlen_func(q, k, v, cu, cu, p.seqlen, p.seqlen, causal=p.causal)
        else:
            out = interface.flash_attn_func(q, k, v, causal=p.causal, window_size=window)
        return out[0] if isinstance(out, tuple) else out

    return _contender("fa3", inputs, "as given", attention)


def flex(inputs: Inputs) -> Contender:
    """Compiled FlexAttention, which is told of the mask as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, device = inputs.problem, inputs.device
    if device.type == "cpu" or p.lengths or p.mask in ("random", "bias", "bias_gradient"):
        raise UnsuitedError("CUDA, and masks that are rules, only")
    torch._dynamo.config.recompile_limit = 1000
    lengths = torch.tensor(p.padded_lengths, device=device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if p.mask == "padding":
            return j < lengths[b]
        if p.mask == "documents":
            return i * 4 // p.seqlen == j * 4 // p.seqlen
        return (i >= j) & (i - j <= p.window) if p.window >= 0 else i >= j

    block_mask = None
    if p.causal or p.mask != "none":
        batch = p.batch if p.mask == "padding" else None
        block_mask = create_block_mask(visible, batch, None, p.seqlen, p.seqlen, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = p.kv_heads != p.heads
    return _contender(
        "flex",
        inputs,
        "heads first",
        lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa),
    )


# The first after ours that runs a problem is the one that ours is checked against.
BACKENDS: dict[str, Callable[[Inputs], Contender]] = {
    "ours": ours,
    **{name: _torch(backend) for backend, name in _TORCH_NAMES.items()},
    "torch_varlen": torch_varlen,
    "fa3": fa3,
    "flex": flex,
    "deterministic": deterministic,
}


def contenders(names: list[str], inputs: Inputs, train: bool) -> tuple[list[Contender], dict[str, str]]:
    """Those that run the problem, tried once, and why the others do not. An error in ours is not caught."""
    able, reasons = [], {}
    for name in names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                contender = BACKENDS[name](inputs)
                with contender.entered(grad=train):
                    out = contender.forward()
                    if train:
                        torch.autograd.grad(out, contender.leaves, contender.dout)
            except UnsuitedError as error:
                reasons[name] = str(error)
                continue
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if name == "ours":
                    raise
                reasons[name] = " ".join([str(error), *(str(warning.message) for warning in caught)]).splitlines()[0]
                continue
        able.append(contender)
    return able, reasons


def check(able: list[Contender], dtype: str, train: bool) -> str:
    """Compares ours with the first other one. Raises if they differ by more than the dtype explains.

    Returns:
        The largest relative difference, in words; or that there was nothing to compare with.
    """
    mine = next((contender for contender in able if contender.name == "ours"), None)
    other = next((contender for contender in able if contender.name != "ours"), None)
    if mine is None or other is None:
        return "nothing to compare with"
    results = []
    for contender in (mine, other):
        with contender.entered(grad=train):
            out = contender.forward()
            gradients = torch.autograd.grad(out, contender.leaves, contender.dout) if train else ()
        values = [out, *gradients[:3]]
        results.append([*(contender.common(x.detach()).float() for x in values), *(x.float() for x in gradients[3:])])
    worst = 0.0
    for name, a, b in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
        difference = float((a - b).norm() / b.norm())
        if not difference <= {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-3}[dtype]:
            raise SystemExit(f"WRONG RESULT: {name} of ours and of {other.name} differ by {difference:.1e}")
        worst = max(worst, difference)
    return f"{worst:.0e} from {other.name}"
