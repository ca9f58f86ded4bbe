"""Times whole training steps of models with this package's attention beside torch's own, in turns on one device.

    python benchmarks/models.py --models llama_padded bert

A step is forward, backward and AdamW, under bfloat16 autocast on CUDA. Both run the same model, as `replace_sdpa()` is
all that differs, and their gradients are compared first. A ratio is torch's time over ours: above 1 ours is faster.
Where steps take much longer than their kernels alone (`kernels_ms`), the device waits for the host.

`train_gpt` is `examples/train_gpt.py --compare`: two whole runs, one after the other, of which the median step by the
host's clock counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import report
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_attn

sys.path.append(str(report.REPOSITORY / "examples"))
import train_gpt  # a script, found by the line above

TOLERANCE = 5e-2  # of gradients, relative, of the norm: bfloat16
LOSS_TOLERANCE = 2e-2  # of two runs' losses of held-out text, relative


@dataclass(frozen=True)
class Shape:
    """A model: pre-norm layers of attention and a perceptron.

    Attributes:
        mask: "none"; "causal"; "padding", bool (batch, 1, 1, seqlen), a third of the keys of all sequences together are
            padding; "left_padded", causal as bool (batch, 1, seqlen, seqlen), the first quarter of the first sequence
            is padding, whose rows see themselves; "relative", a learned bias (1, heads, seqlen, seqlen) by distance,
            for all layers, as T5 has.
        rotary: positions as rotations of q and k.
    """

    width: int
    heads: int
    batch: int
    seqlen: int
    mask: str = "none"
    dropout: float = 0.0
    heads_k: int = 0
    rotary: bool = False
    layers: int = 6


MODELS = {
    "bert": Shape(768, 12, 16, 1024, "padding"),
    "bert_dropout": Shape(768, 12, 16, 1024, "padding", dropout=0.1),
    "llama": Shape(1024, 8, 4, 4096, "causal", heads_k=2, rotary=True),
    "llama_padded": Shape(1024, 8, 4, 4096, "left_padded", heads_k=2, rotary=True),
    "t5": Shape(512, 8, 8, 1024, "relative"),
    "vit": Shape(768, 12, 64, 197),
}


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, section 3.4) of x, (batch, heads, seqlen, head_dim)."""
    half = x.shape[-1] // 2
    speeds = 10000.0 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * speeds
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.head_dim = shape, shape.width // shape.heads
        kv_width = (shape.heads_k or shape.heads) * self.head_dim
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(2))
        self.q, self.out = (nn.Linear(shape.width, shape.width) for _ in range(2))
        self.k, self.v = (nn.Linear(shape.width, kv_width) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        shape, y = self.shape, self.norms[0](x)
        q, k, v = (proj(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        if shape.rotary:
            q, k = rotate(q), rotate(k)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        causal, gqa = shape.mask == "causal", bool(shape.heads_k)
        y = F.scaled_dot_product_attention(q, k, v, mask, shape.dropout, causal, enable_gqa=gqa)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), shape.dropout)
        return x + F.dropout(self.mlp(self.norms[1](x)), shape.dropout)


class Model(nn.Module):
    """Layers over a batch of vectors; the result is their mean square, a loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        if shape.mask == "relative":
            self.bias = nn.Parameter(torch.randn(shape.heads, 2 * shape.seqlen - 1))

    def mask(self, device: torch.device) -> Tensor | None:
        """What `Shape.mask` says, for all layers."""
        shape = self.shape
        positions = torch.arange(shape.seqlen, device=device)
        if shape.mask == "padding":
            lengths = shape.seqlen - 2 * shape.seqlen * torch.arange(shape.batch, device=device) // (3 * shape.batch)
            return (positions < lengths[:, None])[:, None, None, :]
        if shape.mask == "left_padded":
            begins = torch.zeros(shape.batch, 1, 1, 1, dtype=torch.int64, device=device)
            begins[0] = shape.seqlen // 4
            rows = positions[:, None]
            return (positions >= begins) & (rows >= positions) | (rows == positions)
        if shape.mask == "relative":
            return self.bias[:, positions[:, None] - positions + shape.seqlen - 1][None]
        return None

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x.device)
        for layer in self.layers:
            x = layer(x, mask)
        return x.float().square().mean()


def training_step(model: Model, x: Tensor) -> Callable[[], Tensor]:
    """A call that trains the model by one step and returns the loss before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            loss = model(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _gradients(model: Model, x: Tensor, enter: Callable[[], AbstractContextManager[object]]) -> Tensor:
    """Of the projections to v of all layers, in one step."""
    with enter():
        training_step(model, x)()
    weights = [weight for name, weight in model.named_parameters() if name.endswith("v.weight")]
    return torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])


def measure(name: str, shape: Shape, device: torch.device, rounds: int) -> report.Row:
    """A step with torch's attention and one with ours."""
    torch.manual_seed(0)
    model = Model(shape).to(device)
    x = torch.randn(shape.batch, shape.seqlen, shape.width, device=device)
    ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "torch": nullcontext,
        "ours": flash_attn.replace_sdpa,
    }
    steps = {way: training_step(copy.deepcopy(model), x) for way in ways}
    gradients = {way: _gradients(copy.deepcopy(model), x, enter) for way, enter in ways.items()}
    difference = float((gradients["ours"] - gradients["torch"]).norm() / gradients["torch"].norm())
    if not difference <= TOLERANCE and not shape.dropout:
        raise SystemExit(
            f"WRONG RESULT: gradients of {name} with ours and with torch's attention differ by {difference:.1e}"
        )
    with flash_attn.replace_sdpa():
        if len(flash_attn.explain(steps["ours"]).calls) != shape.layers:
            raise SystemExit(f"WRONG KERNELS: {name} did not call ours in every layer")
    timer = timing.device_times if device.type == "cuda" else timing.cpu_times
    times = dict(zip(ways, timer([(enter, steps[way]) for way, enter in ways.items()], rounds), strict=True))
    row = {"model": name, **vars(shape), "agreement": difference}
    if device.type == "cuda":  # a step that waits for the host says little of the device
        for way, enter in ways.items():
            with enter():
                row[f"{way}_kernels_ms"] = round(timing.kernels_ms(steps[way]), 4)
    return (
        row
        | {f"{way}_ms": round(ms, 4) for way, ms in times.items()}
        | {"ratio": round(times["torch"] / times["ours"], 4)}
    )


def measure_train_gpt(device: torch.device, **changes: int) -> report.Row:
    """The example's runs with torch's attention and with ours; `changes` are of its sizes, such as `steps`."""
    cuda = device.type == "cuda"
    sizes = train_gpt.SIZES["large" if cuda else "small"] | changes
    dtype = torch.bfloat16 if cuda else torch.float32
    config = train_gpt.Config(dropout=0.0, seed=0, dtype=dtype, compile=False, **sizes)
    corpus = train_gpt.Corpus(train_gpt.read_text(None), config.context, device)
    runs = {way: train_gpt.train(config, kind, corpus) for way, kind in (("torch", "torch"), ("ours", "flash"))}
    losses = {f"{way}_held_out_loss": run.held_out_loss for way, run in runs.items()}
    difference = abs(runs["ours"].held_out_loss / runs["torch"].held_out_loss - 1)
    if not difference <= LOSS_TOLERANCE:
        raise SystemExit(f"WRONG RESULT: losses of train_gpt with ours and with torch's attention: {losses}")
    times = {way: 1e3 * statistics.median(run.seconds) for way, run in runs.items()}
    row = {"model": "train_gpt", "batch": config.batch, "seqlen": config.context, "width": config.width}
    row |= {"heads": config.heads, "layers": config.layers, "steps": config.steps, "agreement": difference, **losses}
    row |= {f"{way}_ms": round(ms, 4) for way, ms in times.items()}
    return row | {"ratio": round(times["torch"] / times["ours"], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [*MODELS, "train_gpt"]
    add("--models", choices=names, nargs="+", default=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=9, help="samples of each step; their median counts (default 9)")
    add("--seqlen", type=int, help="another length for all, to try it out")
    add("--batch", type=int, help="another batch size for all")
    add("--out", type=Path, help="folder for models.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    for name in args.models:
        changes = {key: value for key in ("seqlen", "batch") if (value := getattr(args, key)) is not None}
        if name == "train_gpt":
            changes = {{"seqlen": "context"}.get(key, key): value for key, value in changes.items()}
            row = measure_train_gpt(device, **changes)
        else:
            row = measure(name, replace(MODELS[name], **changes), device, args.rounds)
        rows.append(row)
        kernels = [f"{row[key]:.2f}" for key in ("torch_kernels_ms", "ours_kernels_ms") if key in row]
        alone = f", kernels alone {' and '.join(kernels)} ms" if kernels else ""
        print(
            f"{name:14} torch {row['torch_ms']:.2f} ms, ours {row['ours_ms']:.2f} ms, x{row['ratio']:.3f}{alone}",
            flush=True,
        )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"header": report.header(device), "rows": rows}
        (args.out / "models.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
