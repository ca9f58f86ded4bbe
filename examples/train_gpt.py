"""Trains a small byte-level GPT whose attention is `flash_attn.FlashMHA`, on the CPU or on a CUDA device.

Writes the loss curve as CSV and PNG and prints a sample of the text that the model writes. Without --text it learns
from the language reference that every Python installation carries, about 460 kB of English.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_attn
from flash_attn import FlashMHA

VOCABULARY = 256  # bytes
# What --size stands for. The large one lets a data center's GPU compute; with the small one its host sets the pace.
SIZES: dict[str, dict[str, int | float]] = {
    "small": {
        "steps": 2000,
        "batch": 4,
        "context": 128,
        "layers": 4,
        "width": 128,
        "heads": 4,
        "learning_rate": 1e-3,
    },
    "large": {
        "steps": 500,
        "batch": 8,
        "context": 4096,
        "layers": 4,
        "width": 1024,
        "heads": 8,
        "learning_rate": 3e-4,
    },
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of a training run."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    learning_rate: float
    dropout: float
    seed: int
    dtype: torch.dtype
    compile: bool


class TorchMHA(nn.Module):
    """What `FlashMHA` computes, by `torch.nn.functional.scaled_dot_product_attention`; weights are named as there."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Causal self-attention; x and the result are (batch, seqlen, d_model)."""
        q, k, v = (W(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for W in (self.W_q, self.W_k, self.W_v))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.W_o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Config, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = attention()
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **options: object) -> Tensor:
        """(batch, seqlen, width) to the same; `options` are those of the attention."""
        x = x + self.dropout(self.attention(self.attention_norm(x), **options))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """A decoder-only transformer over bytes, with learned positions and tied embeddings."""

    def __init__(self, config: Config, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.context = config.context
        self.bytes = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config, attention) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, seqlen) bytes to (batch, seqlen, 256) logits of the byte that follows each."""
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.bytes.weight)


class Corpus:
    """A text as bytes on the device; the last tenth is held out."""

    def __init__(self, text: bytes, context: int, device: torch.device) -> None:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        split = len(data) * 9 // 10
        if len(data) - split <= context + 1:
            raise SystemExit(f"the text has {len(data)} bytes; --context {context} needs at least {11 * (context + 2)}")
        self.context = context
        self.train, self.held_out = data[:split].to(device), data[split:].to(device)

    def batch(self, data: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows and the bytes that follow: two (size, context) tensors. The generator alone fixes which."""
        starts = torch.randint(len(data) - self.context, (size, 1), generator=generator).to(data.device)
        windows = data[starts + torch.arange(self.context + 1, device=data.device)]
        return windows[:, :-1], windows[:, 1:]


@dataclass
class Run:
    """What one training run leaves behind."""

    name: str
    model: GPT
    losses: list[float] = field(default_factory=list)
    held_out_loss: float = math.nan
    seconds: list[float] = field(default_factory=list)  # of each step

    def rate(self, tokens: int) -> float:
        """Tokens a second of the median step, which has `tokens`: the first steps load and choose kernels."""
        return tokens / statistics.median(self.seconds)


class ProgressBar:
    """One line on the terminal, redrawn at most ten times a second; in a file or a pipe a line every tenth."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.terminal = sys.stderr.isatty()
        self.drawn = 0.0

    def update(self, done: int, text: str) -> None:
        now = time.monotonic()
        last = done == self.total
        if self.terminal:
            if not last and now - self.drawn < 0.1:
                return
        elif done * 10 // self.total == (done - 1) * 10 // self.total:
            return
        self.drawn = now
        bar = ("#" * (30 * done // self.total)).ljust(30)
        end = "\n" if last or not self.terminal else ""
        start = "\r" if self.terminal else ""
        print(f"{start}{self.name} [{bar}] {done}/{self.total} {text}", end=end, file=sys.stderr, flush=True)


def build_model(config: Config, attention: str, device: torch.device) -> GPT:
    """A model whose weights depend on the seed alone: the same for --attention flash and torch."""
    torch.manual_seed(config.seed)

    def layer() -> nn.Module:
        if attention == "torch":
            return TorchMHA(config.width, config.heads, config.dropout)
        return FlashMHA(config.width, config.heads, causal=True, dropout=config.dropout)

    return GPT(config, layer).to(device, torch.float64 if config.dtype == torch.float64 else torch.float32)


def loss_of(model: Callable[[Tensor], Tensor], config: Config, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per byte."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.dtype == torch.bfloat16):
        logits = model(tokens)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up over a twentieth of the run, then a cosine down to a tenth."""
    warmup = max(1, config.steps // 20)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def train(config: Config, attention: str, corpus: Corpus) -> Run:
    """Trains one model from the seed on."""
    device = corpus.train.device
    model = build_model(config, attention, device)
    run = Run(f"{attention} attention", model)
    forward = torch.compile(model) if config.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(config.seed)
    progress = ProgressBar(run.name, config.steps)
    tokens = config.batch * config.context
    end = time.monotonic()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = loss_of(forward, config, *corpus.batch(corpus.train, config.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.losses.append(loss.item())
        start, end = end, time.monotonic()
        run.seconds.append(end - start)
        text = f"loss {run.losses[-1]:.3f}, {run.rate(tokens):,.0f} tokens/s, {sum(run.seconds):.0f} s"
        progress.update(step + 1, text)
    run.held_out_loss = evaluate(config, model, corpus)
    return run


@torch.no_grad()
def evaluate(config: Config, model: GPT, corpus: Corpus) -> float:
    """Mean loss over sixteen batches of the held-out text."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [corpus.batch(corpus.held_out, config.batch, generator) for _ in range(16)]
    return sum(loss_of(model, config, *batch).item() for batch in batches) / len(batches)


@torch.no_grad()
def write(config: Config, model: GPT, prompt: bytes, length: int) -> bytes:
    """Continues the prompt by `length` bytes, drawn at temperature 0.8."""
    model.eval()
    device = model.bytes.weight.device
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.tensor(list(prompt), device=device)[None]
    for _ in range(length):
        logits = model(tokens[:, -model.context :])[0, -1].float().cpu()
        token = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, token[None].to(device)], dim=1)
    return bytes(tokens[0].tolist())


def save_curves(runs: list[Run], folder: Path) -> None:
    """Writes loss.csv and, if matplotlib is there, loss.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(run.name for run in runs)])
        writer.writerows([step, *losses] for step, losses in enumerate(zip(*(run.losses for run in runs), strict=True)))
    print(f"loss curve: {folder / 'loss.csv'}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, so there is no picture of the curve (pip install matplotlib)")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for run, style in zip(runs, ("-", "--"), strict=False):
        axes.plot(run.losses, style, linewidth=1, label=f"{run.name}, held out {run.held_out_loss:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="byte-level GPT")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    print(f"            {folder / 'loss.png'}")


def read_text(path: Path | None) -> bytes:
    """The given file, or Python's own language reference."""
    if path is not None:
        return path.read_bytes()
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items())).encode()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()

    def option(name: str, default: object, text: str, **settings: object) -> None:
        shown = "" if default in (None, False) else f" (default {default})"
        parser.add_argument(name, default=default, help=text + shown, **settings)  # type: ignore[arg-type]

    option("--text", None, "learn from this file instead of Python's language reference", type=Path)
    option("--out", Path("."), "folder for loss.csv and loss.png", type=Path)
    option("--device", "cuda" if cuda else "cpu", "such as cpu, cuda or cuda:1", type=torch.device)
    option("--dtype", None, "bf16 is by autocast (default bf16 on CUDA, else fp32)", choices=list(DTYPES))
    option(
        "--attention",
        "flash",
        "flash is FlashMHA; torch is torch's attention, same weights",
        choices=["flash", "torch"],
    )
    compare = (
        "train with both and print where the curves differ most; a high learning rate or bf16 magnifies rounding, "
    )
    compare += "fp64 is free of it"
    option("--compare", False, compare, action="store_true")
    option("--compile", False, "train through torch.compile", action="store_true")
    option(
        "--size", None, "what the options that name it are otherwise (default large on CUDA, else small)", choices=SIZES
    )

    def sized(name: str, text: str, type: type) -> None:
        small, large = (SIZES[size][name.removeprefix("--").replace("-", "_")] for size in ("small", "large"))
        option(name, None, f"{text} (default by --size: {small} or {large})", type=type)

    sized("--steps", "training steps", int)
    sized("--batch", "sequences a step", int)
    sized("--context", "bytes a sequence", int)
    sized("--layers", "transformer blocks", int)
    sized("--width", "width of the model, a multiple of --heads", int)
    sized("--heads", "attention heads", int)
    sized("--learning-rate", "peak learning rate of AdamW", float)
    option("--dropout", 0.0, "dropout, inside attention too", type=float)
    option("--seed", 0, "fixes weights, order of the data and sample", type=int)
    option("--prompt", "The ", "what the sample begins with", type=str)
    option("--sample", 400, "bytes to write at the end", type=int)
    args = parser.parse_args()
    for name, value in SIZES[args.size or ("large" if args.device.type == "cuda" else "small")].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.steps, args.batch, args.context, args.layers, args.heads, len(args.prompt)) < 1:
        parser.error("--steps, --batch, --context, --layers and --heads must be at least 1, and --prompt not empty")
    if args.width % args.heads != 0:
        parser.error(f"--width must be a multiple of --heads, but is {args.width} and --heads {args.heads}")
    return args


def main() -> None:
    args = parse_arguments()
    dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    shared = {name: getattr(args, name) for name in Config.__dataclass_fields__ if name != "dtype"}
    config = Config(dtype=DTYPES[dtype], **shared)
    corpus = Corpus(read_text(args.text), config.context, args.device)
    kinds = ["flash", "torch"] if args.compare else [args.attention]
    count = sum(weight.numel() for weight in build_model(config, kinds[0], args.device).parameters())
    print(f"{count:,} weights, {len(corpus.train):,} bytes to learn from, {args.device}, {dtype}", flush=True)
    if "flash" in kinds:
        model = build_model(config, "flash", args.device)
        tokens = corpus.train[: config.context].expand(config.batch, -1)
        print(flash_attn.explain(lambda: loss_of(model, config, tokens, tokens)).calls[0], flush=True)
    runs = [train(config, kind, corpus) for kind in kinds]
    for run in runs:
        rate = run.rate(config.batch * config.context)
        print(
            f"{run.name}: loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, held out {run.held_out_loss:.3f}, "
            f"{sum(run.seconds):.1f} s, {rate:,.0f} tokens/s"
        )
    if args.compare:
        gaps = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
        print(f"largest difference of the two curves: {max(gaps):.1e}, at step {gaps.index(max(gaps))}")
    save_curves(runs, args.out)
    if args.sample > 0:
        print("sample:\n" + write(config, runs[0].model, args.prompt.encode(), args.sample).decode(errors="replace"))


if __name__ == "__main__":
    main()
