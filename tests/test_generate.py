"""The example that generates text: with a paged cache it writes what it writes without one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPTS = ("The ", "x", "If no exception occurs, ")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("generate")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("page_size", [1, 16])
def test_the_text_is_the_same_with_and_without_a_cache(example: Any, page_size: int, device: str) -> None:
    torch.manual_seed(3)
    config = example.Config(2, 32, 2, 48, 1, 0, 0.0, 0.0, 0, torch.float32, False)
    model = example.build_model(config, "flash", torch.device(device)).double().eval()
    prompts = [torch.tensor(list(prompt.encode())) for prompt in PROMPTS]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    generator = example.Generator(model, config, len(prompts), page_size)
    with torch.no_grad():
        texts = [generator.generate(padded, lengths, 20) for _ in range(2)]  # the cache is used again
        plain = example.generate_without_cache(model, padded, lengths, 20)
    assert all(torch.equal(text, plain) for text in texts) and len(plain.unique()) > 5


def test_it_trains_or_loads_a_model_and_says_whether_the_texts_are_equal(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--device", "cpu", "--model", str(tmp_path / "model"), "--steps", "1", "--count", "3", "--context", "32"]
    monkeypatch.setattr("sys.argv", ["generate.py", *given])
    said = []
    for _ in range(2):  # trained and kept, then loaded
        example.main()
        said.append(capsys.readouterr().out)
    assert all("the texts are equal" in text and "tokens/s" in text for text in said)
    texts = [[line for line in text.splitlines() if "|" in line] for text in said]
    assert texts[0] and texts[0][-3:] == texts[1]
