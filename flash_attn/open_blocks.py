"""With-blocks that hold where they were entered: in that thread or async task, and in the backward passes it starts."""

from __future__ import annotations

from contextvars import ContextVar

from .torch_op.private import caller_of_backward, hand_on_context


class Block:
    """A with-block. It may be left anywhere: a generator that holds it open can be closed by another thread."""

    __slots__ = ("is_open",)

    def __init__(self) -> None:
        self.is_open = True


Blocks = tuple[Block, ...]

_entered: ContextVar[Blocks] = ContextVar("flash_attn_entered", default=())
_inherited: ContextVar[Blocks] = ContextVar("flash_attn_inherited", default=())


def enter() -> Block:
    block = Block()
    _entered.set((*_entered.get(), block))
    hand_on_context()
    return block


def leave(block: Block) -> None:
    block.is_open = False
    _entered.set(tuple(other for other in _entered.get() if other.is_open))
    hand_on_context()


def entered_here() -> Blocks:
    """Blocks that were entered in this context, the innermost last."""
    return _entered.get()


def any_is_open() -> bool:
    for block in _entered.get():
        if block.is_open:
            return True
    return _any_is_open_in_caller_of_backward()


def _any_is_open_in_caller_of_backward() -> bool:
    """For autograd's threads, in which checkpointed functions run again, and in which nothing was entered."""
    caller = caller_of_backward()
    if caller is None:
        return False
    blocks = (*caller.get(_inherited, ()), *caller.get(_entered, ()))
    _inherited.set(blocks)  # for a backward pass that is started from here
    return any(block.is_open for block in blocks)
