"""The tensors of one problem, shared by all backends."""

from __future__ import annotations

import torch
from problem import Problem
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Inputs:
    """q, k, v, the gradient of out, and whatever else the problem has."""

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
        if problem.latent:
            self.v = self.k[..., : problem.latent]
        if problem.float8:  # what such a cache can hold
            self.k, self.v = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (self.k, self.v))
        self.rule = problem.rule(device)
        self.mask = self._mask(generator)
        self.slopes = 2.0 ** (-8 * torch.arange(1, problem.heads + 1, device=device) / problem.heads)
        if problem.lengths:
            starts = torch.tensor([0, *problem.lengths]).cumsum(0)
            self.cu_seqlens = starts.to(device, torch.int32)
            columns = torch.arange(problem.seqlen, device=device)
            self.valid = columns < torch.tensor(problem.lengths, device=device)[:, None]  # (batch, max_seqlen)

    def indices(self) -> tuple[Tensor, Tensor]:
        """Of rows, (seqlen, 1), and of columns, (keys,)."""
        p = self.problem
        return torch.arange(p.seqlen, device=self.device)[:, None], torch.arange(p.keys, device=self.device)

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        p, (i, j) = self.problem, self.indices()
        if self.rule is not None:
            batch = torch.arange(p.batch, device=self.device)[:, None, None, None]
            keep = self.rule(batch, torch.zeros_like(batch), i, j)  # as small as the rule allows
            return keep[(None,) * (4 - keep.ndim)]
        if p.mask in ("random", "per_head"):
            outer = (1, 1) if p.mask == "random" else (p.batch, p.heads)
            shape = (*outer, p.seqlen, p.keys)
            return torch.randint(2, shape, dtype=torch.bool, device=self.device, generator=generator)
        if p.mask in ("bias", "bias_gradient"):
            bias = torch.randn(1, p.heads, p.seqlen, p.keys, device=self.device, generator=generator)
            return bias.to(DTYPES[p.dtype]).requires_grad_(p.mask == "bias_gradient")
        return self._tree() if p.mask == "tree" else None

    def _tree(self) -> Tensor:
        """Node n hangs below a node before it; a row sees what was there before the tree, itself and its ancestors."""
        p, generator = self.problem, torch.Generator().manual_seed(0)
        ancestors = torch.eye(p.seqlen, dtype=torch.bool)
        for node in range(1, p.seqlen):
            ancestors[node] |= ancestors[int(torch.randint(node, (), generator=generator))]
        before = torch.ones(p.seqlen, p.keys - p.seqlen, dtype=torch.bool)
        return torch.cat([before, ancestors], 1)[None, None].to(self.device)

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
