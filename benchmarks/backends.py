"""The implementations that are measured, each turned into a call without arguments for one problem."""

from __future__ import annotations

import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from caches import attention_over_cache
from inputs import Inputs
from problem import DROPOUT, SOFTCAP
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn

FLEX_DEVICES = ("cuda",)  # it has no backward on the CPU
MATH_LIMIT = 2 << 30  # bytes of scores beyond which torch's math path is left out


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


def _func(name: str, inputs: Inputs, **options: Any) -> Contender:
    """This package's `flash_attn_func`."""
    return _contender(
        name,
        inputs,
        "as given",
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **options),
    )


def ours(inputs: Inputs) -> Contender:
    """This package, by the public function that fits."""
    p = inputs.problem
    if p.needs_cache:
        return _contender("ours", inputs, "as given", attention_over_cache(inputs))
    if p.lengths:
        cu = inputs.cu_seqlens
        return _contender(
            "ours",
            inputs,
            "as given",
            lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, p.seqlen, p.seqlen, causal=p.causal),
        )
    if p.window >= 0:
        return _func("ours", inputs, causal=True, window_size=(p.window, 0))
    if p.score == "softcap":
        return _func("ours", inputs, causal=p.causal, softcap=SOFTCAP)
    if p.score == "alibi":
        return _func("ours", inputs, causal=p.causal, alibi_slopes=inputs.slopes)
    return _contender(
        "ours", inputs, "heads first", _sdpa(flash_attn.scaled_dot_product_attention, inputs, inputs.mask)
    )


def rule(inputs: Inputs) -> Contender:
    """This package, told of the rule behind a dense mask: what a mask could cost at best."""
    p = inputs.problem
    if p.mask == "tril":
        return _func("rule", inputs, causal=True)
    if p.mask == "window":
        return _func("rule", inputs, causal=True, window_size=(p.dense_window, 0))
    raise UnsuitedError("for dense masks that an argument can say")


def deterministic(inputs: Inputs) -> Contender:
    """This package with repeatable gradients."""
    p = inputs.problem
    if p.lengths or p.case != "none":
        raise UnsuitedError("for dense problems without a mask")
    window = (p.window, 0) if p.window >= 0 else (-1, -1)
    return _func("deterministic", inputs, causal=p.causal, window_size=window, deterministic=True)


def _paged(page: int) -> Callable[[Inputs], Contender]:
    """This package, of keys and values in pages, which stand in no order."""

    def build(inputs: Inputs) -> Contender:
        p = inputs.problem
        if p.seqlen > 16 or not p.seqlen_k or p.keys % page != 0 or inputs.device.type == "cpu":
            raise UnsuitedError("for few query rows over a cache on CUDA")
        return _contender(f"paged{page}", inputs, "as given", attention_over_cache(inputs, page))

    return build


def _sdpa(function: Callable[..., Tensor], inputs: Inputs, mask: Tensor | None) -> Attention:
    p = inputs.problem
    causal = p.causal and p.window < 0 and not p.lengths
    dropout, gqa = (DROPOUT if p.score == "dropout" else 0.0), p.kv_heads != p.heads
    return lambda q, k, v: function(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=gqa)


def _torch(backend: SDPBackend) -> Callable[[Inputs], Contender]:
    """One backend of torch's scaled_dot_product_attention, with dense masks for windows and packed sequences."""

    def build(inputs: Inputs) -> Contender:
        p = inputs.problem
        if inputs.device.type == "cpu" and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            raise UnsuitedError("not for the CPU")
        if p.needs_cache:
            raise UnsuitedError("has no caches: no lengths on the device, no float8, causal is from the first key")
        if p.score == "softcap":
            raise UnsuitedError("has no softcap")
        if p.score == "alibi":
            raise UnsuitedError("has no ALiBi but as a dense bias: see the case bias")
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
        lambda q, k, v: varlen_attn(q, k, v, cu, cu, p.seqlen, p.seqlen, **causal),  # type: ignore[arg-type,return-value]
    )


def fa3(inputs: Inputs) -> Contender:
    """FlashAttention 3, if its `flash_attn_interface` is installed."""
    p = inputs.problem
    if inputs.device.type == "cpu" or not importlib.util.find_spec("flash_attn_interface"):
        raise UnsuitedError("not installed")
    if p.case not in ("none", "softcap") or p.dtype == "fp32" or p.needs_cache:
        raise UnsuitedError("no masks, no dropout, no ALiBi, no fp32; caches are not called")
    import flash_attn_interface as interface  # type: ignore[import-not-found]

    window = (p.window, 0) if p.window >= 0 else (-1, -1)
    softcap = SOFTCAP if p.score == "softcap" else 0.0

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if p.lengths:
            cu = inputs.cu_seqlens
            out = interface.flash_attn_varlen_func(q, k, v, cu, cu, p.seqlen, p.seqlen, causal=p.causal)
        else:
            out = interface.flash_attn_func(q, k, v, causal=p.causal, window_size=window, softcap=softcap)
        return out[0] if isinstance(out, tuple) else out

    return _contender("fa3", inputs, "as given", attention)


def compiled(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    """By torch.compile, anew for every shape. Backward is timed on one graph again and again, so it may not use what
    forward has kept for buffers of its own, as compiled graphs do (which saves them memory in a step)."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    dynamo.recompile_limit = 1000
    functorch.donated_buffer = False
    return torch.compile(function, dynamic=False, **options)  # type: ignore[call-overload]


def flex(inputs: Inputs) -> Contender:
    """Compiled FlexAttention, which is told of the mask as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, device, slopes = inputs.problem, inputs.device, inputs.slopes
    if (
        device.type not in FLEX_DEVICES
        or p.lengths
        or p.needs_cache
        or p.score == "dropout"
        or (p.mask != "none" and inputs.rule is None)
    ):
        raise UnsuitedError("CUDA, masks that are rules, and no dropout")

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= p.window) if p.window >= 0 else i >= j

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return SOFTCAP * (score / SOFTCAP).tanh()

    def with_alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j).abs()

    visible = inputs.rule or (causal if p.causal else None)
    block_mask = None
    if visible is not None:
        batch = p.batch if p.mask == "padding" else None
        block_mask = create_block_mask(visible, batch, None, p.seqlen, p.keys, device=device)
    score_mod = {"softcap": capped, "alibi": with_alibi}.get(p.score)
    function, gqa = compiled(flex_attention), p.kv_heads != p.heads
    return _contender(
        "flex",
        inputs,
        "heads first",
        lambda q, k, v: function(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa),
    )


# The first after ours that runs a problem is the one that ours is checked against.
BACKENDS: dict[str, Callable[[Inputs], Contender]] = {
    "ours": ours,
    **{name: _torch(backend) for backend, name in _TORCH_NAMES.items()},
    "torch_varlen": torch_varlen,
    "fa3": fa3,
    "flex": flex,
    "deterministic": deterministic,
    "rule": rule,
    **{f"paged{page}": _paged(page) for page in (16, 64, 256)},
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
                text = " ".join([str(error), *(str(warning.message) for warning in caught)])
                reasons[name] = re.sub(r" *\(Triggered internally at [^)]*\)", "", text).splitlines()[0]
                continue
        able.append(contender)
    return able, reasons
