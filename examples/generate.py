"""Generates text with the GPT of train_gpt.py, with keys and values in a paged cache, and without one.

Several prompts of different lengths are continued at once, greedily: the text is the same both ways, and so much faster
with the cache. The model is trained first, or loaded from --model if that file is there; --model also keeps it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from train_gpt import DTYPES, GPT, Config, Corpus, build_model, read_text, train

from flash_attn import KVCache


class Generator:
    """Continues prompts with a cache: each sequence has as many pages as it needs, taken in no order."""

    def __init__(self, model: GPT, config: Config, batch: int, page_size: int) -> None:
        device = model.bytes.weight.device
        blocks = -(-config.context // page_size)
        self.model = model
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        table = torch.randperm(batch * blocks, device=device).view(batch, blocks).int()
        shape = (batch * blocks, page_size, config.heads, config.width // config.heads)

        def pages() -> Tensor:
            return torch.empty(shape, dtype=model.bytes.weight.dtype, device=device)

        self.caches = [KVCache(pages(), pages(), self.seqlens, table) for _ in model.blocks]

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, seqlen) bytes that follow what is in the cache to (batch, seqlen, 256) logits."""
        rows = torch.arange(tokens.shape[1], device=tokens.device)
        places = (self.seqlens[:, None] + rows).clamp(max=self.model.context - 1)
        x = self.model.bytes(tokens) + self.model.positions(places)
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x = block(x, cache=cache)
        return F.linear(self.model.norm(x), self.model.bytes.weight)

    def generate(self, prompts: Tensor, lengths: Tensor, count: int) -> Tensor:
        """Prompts (batch, longest), padded on the right, continued by (batch, count) bytes."""
        self.seqlens.zero_()
        last = self.logits(prompts).gather(1, (lengths - 1)[:, None, None].expand(-1, 1, 256))
        # What the padding has left in the cache lies behind each sequence, where the next bytes go.
        self.seqlens.copy_(lengths)
        written = [last[:, 0].argmax(-1)]
        for _ in range(count - 1):
            written.append(self.logits(written[-1][:, None])[:, 0].argmax(-1))
            self.seqlens += 1
        return torch.stack(written, 1)


def generate_without_cache(model: GPT, prompts: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The same; each byte takes a pass over all that is before it."""
    tokens = F.pad(prompts, (0, count))
    rows = torch.arange(len(tokens), device=tokens.device)
    for step in range(count):
        at = lengths + step
        tokens[rows, at] = model(tokens[:, : int(at.max())])[rows, at - 1].argmax(-1)
    return torch.stack([tokens[rows, lengths + i] for i in range(count)], 1)


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a second call returns, and its seconds."""
    function()
    start = time.monotonic()
    result = function().cpu()  # waits for the device
    return result, time.monotonic() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--model", type=Path, help="load the weights from this file, or train and keep them there")
    add("--device", type=torch.device, default="cuda" if cuda else "cpu", help="such as cpu, cuda or cuda:1")
    add("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32", help="of weights and cache")
    add("--prompts", nargs="+", default=["The ", "A class is ", "If no exception occurs, "], help="to be continued")
    add("--count", type=int, default=200, help="bytes to write (default 200)")
    add("--page-size", type=int, default=16, help="rows of a page of the cache (default 16)")
    add("--steps", type=int, default=500, help="training steps (default 500)")
    add("--context", type=int, default=256, help="bytes a sequence (default 256)")
    args = parser.parse_args()
    longest = max(len(prompt.encode()) for prompt in args.prompts)
    if min(len(prompt) for prompt in args.prompts) < 1 or args.count < 1 or longest + args.count > args.context:
        parser.error("prompts must not be empty, and with --count bytes more not be longer than --context")
    return args


def load_model(args: argparse.Namespace) -> tuple[GPT, Config]:
    config = Config(4, 128, 4, args.context, 4, args.steps, 1e-3, 0.0, 0, torch.float32, False)
    if args.model is not None and args.model.exists():
        model = build_model(config, "flash", args.device)
        model.load_state_dict(torch.load(args.model, map_location=args.device, weights_only=True))
    else:
        model = train(config, "flash", Corpus(read_text(None), config.context, args.device)).model
        if args.model is not None:
            torch.save(model.state_dict(), args.model)
    return model.to(DTYPES[args.dtype]).eval(), config


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    with torch.enable_grad():
        model, config = load_model(args)
    prompts = [torch.tensor(list(prompt.encode())) for prompt in args.prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=args.device)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(args.device)
    generator = Generator(model, config, len(prompts), args.page_size)
    texts, seconds = timed(lambda: generator.generate(padded, lengths, args.count))
    plain, plain_seconds = timed(lambda: generate_without_cache(model, padded, lengths, args.count))
    for prompt, text in zip(args.prompts, texts, strict=True):
        print(f"{prompt}|{bytes(text.tolist()).decode(errors='replace')}\n")
    written = args.count * len(prompts)
    print(f"with a paged cache {written / seconds:,.0f} tokens/s, without {written / plain_seconds:,.0f}")
    print("the texts are equal" if torch.equal(texts, plain) else f"the texts differ in {int((texts != plain).sum())}")


if __name__ == "__main__":
    main()
