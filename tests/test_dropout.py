"""Dropout draws the mask that the reference draws, everywhere the same."""

from __future__ import annotations

import pytest
import torch

import reference
from flash_attn import scaled_dot_product_attention
from flash_attn.torch_op import attention as ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _mask(rng_state: torch.Tensor, p: float, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(batch, heads, rows, columns) of zeros and ones, read off uniform attention to an identity matrix."""
    rows, cols = 37, 61
    q = torch.zeros(2, 3, rows, 8, dtype=dtype, device=device)
    v = torch.eye(cols, dtype=dtype, device=device).expand(2, 3, cols, cols)
    k = torch.zeros(2, 3, cols, 8, dtype=dtype, device=device)
    out, _ = ops.attention(q, k, v, rng_state=rng_state.to(device), dropout_p=p, heads_first=True)
    return (out != 0).cpu()


def test_philox_known_answers() -> None:
    """Vectors of the Random123 distribution for philox4x32 with 7 and with 10 rounds."""
    pi = ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0))
    ones = ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF))
    zeros = ([0] * 4, (0, 0))
    cases = [
        (7, zeros, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (7, ones, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (7, pi, [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
        (10, zeros, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (10, ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (10, pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for rounds, (counter, key), expected in cases:
        words = reference.philox4x32([torch.tensor(c) for c in counter], key, rounds)
        assert [int(w) for w in words] == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_the_mask_is_the_references_bit_for_bit(p: float, dtype: torch.dtype, device: str) -> None:
    rng_state = torch.tensor([-(2**61) + 12345, 2**40 + 7])
    expected = torch.stack([reference.dropout_factor(rng_state, p, 2, 3, b, 37, 61) for b in range(2)]) > 0
    assert torch.equal(_mask(rng_state, p, device, dtype), expected)


def test_digits_of_any_two_scores_are_independent() -> None:
    """A digit is a sum modulo 2 of drawn ones: the 32 of two scores are linearly independent."""
    drawn = torch.eye(256, dtype=torch.int64).view(256, 8, 32)  # each drawn digit by itself
    terms = reference.dropout_digits(drawn).permute(2, 1, 0)  # (score, digit, drawn digit)
    masks = [[sum(1 << int(i) for i in digit.nonzero()) for digit in score] for score in terms]
    for first in range(32):
        for second in range(first):
            basis: list[int] = []
            for row in masks[first] + masks[second]:
                for known in basis:
                    row = min(row, row ^ known)
                assert row != 0, (first, second)
                basis.append(row)


def test_a_small_share() -> None:
    """Less than the first eight digits can say, and what the first eight leave open."""
    for p in (0.001, 0.25 + 1 / 512):
        dropped = reference.dropout_factor(torch.tensor([6, 1]), p, 1, 8, 0, 512, 512) == 0
        expected, count = round(p * 65536) / 65536, dropped.numel()
        assert abs(float(dropped.sum()) - count * expected) < 5 * (count * expected * (1 - expected)) ** 0.5
        pairs = dropped[:, :-1] & dropped[:, 1:]  # neighbouring rows: half of the pairs are of one group
        both = pairs.numel() * expected**2
        assert abs(float(pairs.sum()) - both) < 5 * both**0.5 + 1


def test_the_share_that_is_dropped() -> None:
    rng_state = torch.tensor([5, 0])
    for p in (0.1, 0.5, 0.9):
        kept = torch.stack([_mask(rng_state + i, p, "cpu").float().mean() for i in range(8)]).mean()
        assert abs(float(kept) - (1 - p)) < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_manual_seed_repeats_and_each_call_draws_anew(device: str) -> None:
    x = torch.randn(2, 3, 40, 16, device=device)

    def run() -> torch.Tensor:
        return scaled_dot_product_attention(x, x, x, dropout_p=0.3)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first) and not torch.equal(first, second)


def test_the_mean_over_masks_is_attention_without_dropout() -> None:
    x = torch.randn(1, 1, 8, 4, dtype=torch.float64)
    mean = torch.stack([scaled_dot_product_attention(x, x, x, dropout_p=0.5) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, scaled_dot_product_attention(x, x, x), rtol=0.0, atol=0.1)
