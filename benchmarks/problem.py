"""One attention problem: its sizes, what is masked, what happens to its scores, and the work that it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MASKS = (
    "none",
    "random",
    "bias",
    "bias_gradient",
    "padding",
    "documents",
    "tril",
    "window",
    "prefix",
    "per_head",
    "tree",
)
SCORES = ("none", "dropout", "softcap", "alibi")
CASES = tuple(dict.fromkeys(MASKS + SCORES))
DOCUMENTS = 8
DROPOUT = 0.1
SOFTCAP = 30.0

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, row, column: is it seen


@dataclass(frozen=True)
class Problem:
    """One attention problem. Tensors are (batch, seqlen, heads, head_dim) in memory, packed when `lengths` are given.

    Attributes:
        mask: what is handed over as a dense attn_mask. Rules on rows and columns as bool masks: "padding", (batch, 1,
            1, seqlen), keys beyond each sequence's length; "documents", (1, 1, seqlen, seqlen), eight of them; "tril",
            causal; "window", causal with a sixteenth of the length; "prefix", causal behind a quarter that all rows
            see. Others: "random", (1, 1, seqlen, seqlen), half of it true; "per_head", the same as (batch, heads,
            seqlen, seqlen); "tree", all keys but the last `seqlen`, and of these each row's ancestors in a random tree;
            "bias", (1, heads, seqlen, seqlen) of q's dtype; "bias_gradient", the same with its gradient.
        score: what happens to the scores: nothing, "dropout" of 0.1, "softcap" of 30, "alibi" with slopes of 2 to the
            power of -8 (head + 1) / heads.
        window: keys left of the diagonal that a causal row sees; -1 is all.
        lengths: of the packed sequences, for the varlen functions.
        seqlen_k: rows of k and v where they are others than those of q, without a mask; causal is from the last key.
        filled: rows that each sequence has in a cache of seqlen_k, which are known on the device alone.
        float8: k and v are a cache in float8_e4m3fn with a scale a head.
        latent: columns of a key that are its value too, in a cache; 0: values are apart.
    """

    head_dim: int
    causal: bool
    seqlen: int
    batch: int
    heads: int
    dtype: str = "bf16"
    heads_k: int = 0
    mask: str = "none"
    window: int = -1
    lengths: tuple[int, ...] = ()
    seqlen_k: int = 0
    score: str = "none"
    filled: tuple[int, ...] = ()
    float8: bool = False
    latent: int = 0

    @property
    def kv_heads(self) -> int:
        return self.heads_k or self.heads

    @property
    def keys(self) -> int:
        return self.seqlen_k or self.seqlen

    @property
    def needs_cache(self) -> bool:
        """Only functions that take a cache say it."""
        return bool(self.filled) or self.float8 or self.latent > 0 or (self.causal and self.seqlen_k > 0)

    @property
    def filled_keys(self) -> int:
        """Keys of all sequences together that are not those of q."""
        return sum(self.filled) if self.filled else self.batch * self.seqlen_k

    @property
    def case(self) -> str:
        """What is special about the mask or the scores."""
        return self.score if self.score != "none" else self.mask

    @property
    def padded_lengths(self) -> tuple[int, ...]:
        """Keys that each sequence keeps under the padding mask; of four all, 3/4, 1/2 and 1/4."""
        return tuple(self.seqlen - self.seqlen * i // self.batch for i in range(self.batch))

    @property
    def dense_window(self) -> int:
        """Keys left of the diagonal that a row sees under the mask "window"."""
        return self.seqlen // 16

    @property
    def prefix(self) -> int:
        """Keys that all rows see under the mask "prefix"."""
        return self.seqlen // 4

    def rule(self, device: torch.device) -> Rule | None:
        """Which keys a row sees, where the mask is a rule."""
        n = self.seqlen
        lengths, window, prefix = torch.tensor(self.padded_lengths, device=device), self.dense_window, self.prefix
        rules: dict[str, Rule] = {
            "padding": lambda b, h, i, j: j < lengths[b],
            "documents": lambda b, h, i, j: i * DOCUMENTS // n == j * DOCUMENTS // n,
            "tril": lambda b, h, i, j: i >= j,
            "window": lambda b, h, i, j: (i >= j) & (i - j <= window),
            "prefix": lambda b, h, i, j: (i >= j) | (j < prefix),
        }
        return rules.get(self.mask)

    @property
    def visible_pairs(self) -> float:
        """(query, key) pairs a head that take part; causal counts as half, as everybody counts it. A mask at random
        counts as all: no part of it can be left out."""
        n = self.seqlen
        half = 0.5 if self.causal or self.mask == "tril" else 1.0
        if self.lengths:
            return half * sum(length * length for length in self.lengths)
        if self.mask == "padding":
            return half * n * sum(self.padded_lengths)
        if self.mask == "documents":
            return half * self.batch * n * n / DOCUMENTS
        if self.mask == "prefix":
            return self.batch * (n * n + self.prefix**2) / 2
        if self.seqlen_k:
            return n * self.filled_keys - self.causal * self.batch * n * (n - 1) / 2
        window = self.dense_window if self.mask == "window" else self.window
        if 0 <= window < n:
            return self.batch * (n * (window + 1) - window * (window + 1) / 2)
        return half * self.batch * n * n

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.batch * self.seqlen

    def flops(self, passes: str) -> float:
        """Of the two matrix products forward; backward counts 2.5 times that, as everybody counts it."""
        forward = 2.0 * self.visible_pairs * self.heads * (self.head_dim + (self.latent or self.head_dim))
        return forward * {"fwd": 1.0, "bwd": 2.5, "step": 3.5}[passes]

    def bytes(self, passes: str) -> float:
        """Least traffic: q, k, v, out forward; those, dout, dq, dk, dv backward."""
        size = {"bf16": 2, "fp16": 2, "fp32": 4}[self.dtype]
        keys = self.filled_keys if self.seqlen_k else self.tokens
        key_size = 1 if self.float8 else size
        columns = self.head_dim + (self.latent or self.head_dim)
        stored = self.head_dim if self.latent else columns
        forward = columns * self.tokens * self.heads * size + stored * keys * self.kv_heads * key_size
        return forward * {"fwd": 1, "bwd": 2, "step": 3}[passes]

    def __str__(self) -> str:
        parts = [f"d{self.head_dim}", "causal" if self.causal else "full", self.dtype]
        size = f"{len(self.lengths)} packed, {self.tokens} in all" if self.lengths else f"{self.batch}x{self.seqlen}"
        parts.append(size + (f" on {self.seqlen_k} keys" if self.seqlen_k else ""))
        parts.append(f"{self.heads} heads" + (f" on {self.heads_k}" if self.heads_k else ""))
        if self.filled:
            parts.append(f"{min(self.filled)} to {max(self.filled)} filled")
        parts += ["float8"] * self.float8 + [f"values {self.latent} of it"] * (self.latent > 0)
        parts += [self.case] * (self.case != "none") + [f"window {self.window}"] * (self.window >= 0)
        return " ".join(parts)
