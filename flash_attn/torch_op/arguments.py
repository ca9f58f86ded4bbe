"""The arguments of `flash_attn::forward`, in the order of its schema, and of the ops that derive it; C++ lists them in
csrc/ops/arguments/arguments.h.

forward(*tensors, *options); backward(dout, dlse, *tensors, out, lse, needs, *options);
forward_jvp(*tangents, *tensors, out, lse, *options);
backward_jvp(dout, dlse, tdout, tdlse, *tangents, *tensors, out, lse, tout, tlse, needs, *options).

Always by position: torch looks each keyword up by a new string, which for ten options costs more than the rest of the
call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

NONE, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2  # what `causal` is


class Tensors(NamedTuple):
    """Shapes are those of :func:`flash_attn.torch_op.attention.attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    packed_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    rng_state: Tensor | None


class Options(NamedTuple):
    """As in :func:`flash_attn.torch_op.attention.attention`, but with nothing left to be inferred."""

    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float | None
    causal: int
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    heads_first: bool
    deterministic: bool


def plain_options(causal: int, heads_first: bool, deterministic: bool) -> int:
    """What the plain ops take besides tensors and the scale as one number, see csrc/ops/arguments/arguments.h."""
    return causal | heads_first << 2 | deterministic << 3


PLAIN_DETERMINISTIC = plain_options(0, False, True)
PLAIN_IF_THEY_FIT = 16  # forward returns None twice where torch's function would change shapes: an error takes longer
PLAIN_WITHOUT_LSE = 32  # forward returns None for it
PLAIN_SHARED_HEADS = 64  # with the first: several heads of q may share one of k


def from_plain(q: Tensor, k: Tensor, softmax_scale: float | None, plain: int) -> Options:
    """The options of forward that mean the same."""
    heads_first = bool(plain & 4)
    rows = 2 if heads_first else 1
    deterministic = bool(plain & 8)
    return Options(q.shape[rows], k.shape[rows], softmax_scale, plain & 3, -1, -1, 0.0, 0.0, heads_first, deterministic)


NUM_TENSORS = len(Tensors._fields)
NUM_DIFFERENTIABLE = 6  # the first six tensors: q, k, v, attn_mask, alibi_slopes, sinks


class Tangents(NamedTuple):
    """Of the differentiable tensors, each of its tensor's shape and dtype; None is zero."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None


def split_forward(arguments: tuple[Any, ...]) -> tuple[Tensors, Options]:
    """Of what the dispatcher hands to a kernel of forward."""
    return Tensors(*arguments[:NUM_TENSORS]), Options(*arguments[NUM_TENSORS:])


class BackwardArguments(NamedTuple):
    """What the dispatcher hands to a kernel of backward, taken apart by :func:`split_backward`."""

    dout: Tensor
    dlse: Tensor | None
    tensors: Tensors
    out: Tensor
    lse: Tensor
    needs: list[bool]  # for each differentiable tensor, whether its gradient is wanted
    options: Options


def split_backward(arguments: tuple[Any, ...]) -> BackwardArguments:
    dout, dlse, *rest = arguments
    tensors, (out, lse, needs), options = (
        rest[:NUM_TENSORS],
        rest[NUM_TENSORS : NUM_TENSORS + 3],
        rest[NUM_TENSORS + 3 :],
    )
    return BackwardArguments(dout, dlse, Tensors(*tensors), out, lse, needs, Options(*options))


class ForwardJvpArguments(NamedTuple):
    """What the dispatcher hands to a kernel of forward_jvp, taken apart by :func:`split_forward_jvp`."""

    tangents: Tangents
    tensors: Tensors
    out: Tensor
    lse: Tensor
    options: Options


NUM_FORWARD_JVP_TENSORS = NUM_DIFFERENTIABLE + NUM_TENSORS + 2


def split_forward_jvp(arguments: tuple[Any, ...]) -> ForwardJvpArguments:
    tangents, rest = arguments[:NUM_DIFFERENTIABLE], arguments[NUM_DIFFERENTIABLE:]
    tensors, (out, lse, *options) = rest[:NUM_TENSORS], rest[NUM_TENSORS:]
    return ForwardJvpArguments(Tangents(*tangents), Tensors(*tensors), out, lse, Options(*options))


class BackwardJvpArguments(NamedTuple):
    """What the dispatcher hands to a kernel of backward_jvp, taken apart by :func:`split_backward_jvp`."""

    dout: Tensor
    dlse: Tensor | None
    tdout: Tensor | None
    tdlse: Tensor | None
    tangents: Tangents
    tensors: Tensors
    out: Tensor
    lse: Tensor
    tout: Tensor | None
    tlse: Tensor | None
    needs: list[bool]  # as in backward
    options: Options


NUM_BACKWARD_JVP_TENSORS = 4 + NUM_FORWARD_JVP_TENSORS + 2


def split_backward_jvp(arguments: tuple[Any, ...]) -> BackwardJvpArguments:
    cotangents, rest = arguments[:4], arguments[4:]
    tangents, tensors, rest = (
        rest[:NUM_DIFFERENTIABLE],
        rest[NUM_DIFFERENTIABLE : NUM_DIFFERENTIABLE + NUM_TENSORS],
        rest[NUM_DIFFERENTIABLE + NUM_TENSORS :],
    )
    (out, lse, tout, tlse), needs, options = rest[:4], rest[4], rest[5:]
    dout, dlse, tdout, tdlse = cotangents
    t, given, left = Tangents(*tangents), Tensors(*tensors), Options(*options)
    return BackwardJvpArguments(dout, dlse, tdout, tdlse, t, given, out, lse, tout, tlse, needs, left)
