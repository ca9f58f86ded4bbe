"""Which scores dropout keeps: csrc/philox.h, in torch's integers."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS, _BLOCK, _DIGITS, _DRAWN = 7, 16, 16, 8


def kept(rng_state: Tensor, dropout_p: float, batch_heads: Tensor, rows: slice, cols: slice) -> tuple[Tensor, float]:
    """Which scores are kept, (*batch_heads.shape, rows, columns) bool, and the factor of those.

    Args:
        rng_state: (2) int64, seed and offset.
        dropout_p: probability that a score is dropped.
        batch_heads: int64, batch * num_heads + head of each head, on rng_state's device.
        rows: of their sequence, from a multiple of 16 on.
        cols: likewise.
    """
    threshold = int(dropout_p * 65536.0 + 0.5)
    row = torch.arange(rows.start, rows.stop, device=rng_state.device)[:, None]
    col = torch.arange(cols.start, cols.stop, device=rng_state.device)
    if threshold >= 65536:
        return batch_heads.new_zeros((), dtype=torch.bool).expand(*batch_heads.shape, len(row), len(col)), 0.0
    down = torch.arange(rows.start // _BLOCK * 4, -(-rows.stop // _BLOCK) * 4, device=rng_state.device)[:, None]
    across = torch.arange(cols.start // _BLOCK * 2, -(-cols.stop // _BLOCK) * 2, device=rng_state.device)
    groups = _compare(_words(rng_state, batch_heads[..., None, None], down, across), threshold)
    bit = 16 * (col % 2) + 8 * (row % 2) + 4 * (col // 2 % 2) + 2 * (col // 8 % 2) + row // 8 % 2
    group_row, group_col = row // _BLOCK * 4 + row // 2 % 4 - down[0], col // _BLOCK * 2 + col // 4 % 2 - across[0]
    return (groups[..., group_row, group_col] >> bit & 1).bool(), 65536 / (65536 - threshold)


def _words(rng_state: Tensor, batch_head: Tensor, down: Tensor, across: Tensor) -> list[Tensor]:
    """The eight words of each group, 32 bits in an int64."""
    seed, offset = rng_state
    words = []
    for block in (0, 1):
        c0, c1, c2, c3 = 2 * across + block, down, batch_head & _WORD, offset & _WORD
        k0, k1 = seed & _WORD, seed >> 32 & _WORD
        for _ in range(_ROUNDS):
            high0, low0 = _product(0xD2511F53, c0)
            high1, low1 = _product(0xCD9E8D57, c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
        words += [c0, c1, c2, c3]
    return words


def _product(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32 by 32 bits, in steps that fit into an int64."""
    low = (x & 0xFFFF) * constant
    high = (x >> 16) * constant + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _compare(words: list[Tensor], threshold: int) -> Tensor:
    """Bits of the scores of a group whose sixteen digits, as a number, are at least the threshold."""
    kept = torch.full_like(words[0], _WORD)
    digits = [*words, *(_rotated(x, 11) ^ _rotated(x, 18) for x in words)]
    for i in reversed(range(_DIGITS)):  # from the last digit to the first, which decides
        wanted = threshold >> (_DIGITS - 1 - i) & 1
        kept = digits[i] & kept if wanted else digits[i] | kept
    return kept


def _rotated(x: Tensor, bits: int) -> Tensor:
    return (x << bits | x >> (32 - bits)) & _WORD
