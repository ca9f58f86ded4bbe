"""Models of Transformers with `attn_implementation="flash_attention_2"`, as they come, call this package.

Logits and gradients are held against the eager model in float32: an error may be at most twice that of the eager model
in bfloat16, plus a floor. Transformers offers this attention on GPUs only; on the CPU its question whether there is one
is answered with yes, and nothing else of it is touched.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
from introspection import needs_introspection

transformers = pytest.importorskip("transformers")
if "flash-attn" not in importlib.metadata.packages_distributions().get("flash_attn", []):
    pytest.skip("Transformers looks for an installed flash-attn", allow_module_level=True)

BATCH, SEQLEN, WORDS = 3, 40, 99
LENGTHS = (40, 23, 9)  # tokens of padded rows; of packed sequences too
FLOOR = 4e-3  # relative, of the norm
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 128}
BART = {
    "vocab_size": WORDS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}

# The class of the model, and its configuration.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 24}),
    "Gemma2": (
        "Gemma2ForCausalLM",
        DECODER | {"head_dim": 32, "query_pre_attn_scalar": 8, "sliding_window": 8, "attn_logit_softcapping": 3.0},
    ),
    "Mistral": ("MistralForCausalLM", DECODER | {"sliding_window": 8}),
    # All experts for each token: which ones it takes would hang on the last bit of a score.
    "Mixtral": ("MixtralForCausalLM", DECODER | {"num_local_experts": 2, "num_experts_per_tok": 2}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertForMaskedLM", SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "BART": ("BartForConditionalGeneration", BART),
}
MODELS = DECODERS | ENCODERS
BATCHES = ("plain", "left", "right", "packed")
# For queries of a decoder over several keys Transformers takes the encoder's mask, whoever computes attention.
UNMASKED = ("BART",)
CASES = [
    (model, batch)
    for model in MODELS
    for batch in BATCHES
    if (batch != "packed" or model in DECODERS) and (batch == "plain" or model not in UNMASKED)
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    asked = transformers.utils.import_utils
    forget = getattr(asked.is_flash_attn_2_available, "cache_clear", lambda: None)
    if not torch.cuda.is_available():
        monkeypatch.setattr(asked, "is_torch_mlu_available", lambda: True)  # the least that is asked anywhere else
        forget()
    yield request.param
    forget()


def _model(name: str, attention: str, dtype: torch.dtype, device: str) -> Any:
    """The same weights whatever the attention and the dtype: those of bfloat16, and scores that differ a lot."""
    kind, settings = MODELS[name]
    model_class = getattr(transformers, kind)
    if not model_class._supports_flash_attn:
        pytest.skip(f"Transformers {transformers.__version__} has no such attention for {name}")
    config = model_class.config_class(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class._from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    if model.config._attn_implementation != attention:
        raise AssertionError(f"{name} took {model.config._attn_implementation}")
    return model.to(device, dtype).train()


def _inputs(name: str, batch: str, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """What the model is called with, and (batch, seqlen) bool: which tokens count."""
    generator = torch.Generator().manual_seed(2)
    shape = (1, sum(LENGTHS)) if batch == "packed" else (BATCH, SEQLEN)
    tokens = torch.randint(3, WORDS, shape, generator=generator).to(device)
    inputs, counts = {"input_ids": tokens}, torch.ones_like(tokens, dtype=torch.bool)
    positions = torch.arange(SEQLEN, device=device)
    if batch in ("left", "right"):
        lengths = torch.tensor(LENGTHS, device=device)[:, None]
        counts = positions >= SEQLEN - lengths if batch == "left" else positions < lengths
        inputs["attention_mask"] = counts.long()
    if batch == "packed":
        inputs["position_ids"] = torch.cat([positions[:length] for length in LENGTHS])[None]
    if name == "BART":
        inputs["decoder_input_ids"] = tokens.roll(1, 1)
    return inputs, counts


def _results(model: Any, inputs: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
    """Logits of the tokens that count, and the gradients of all weights for a random gradient of those."""
    logits = model(**inputs).logits[counts]
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits.backward(grad.to(logits))
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": logits.detach(), **gradients}


def _alone(model: Any, inputs: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
    """As `_results` for packed sequences, each of which is a call of its own."""
    parts = inputs["input_ids"].split(LENGTHS, 1)

    def call(input_ids: Tensor, position_ids: Tensor) -> Any:
        logits = torch.cat([model(input_ids=part).logits for part in parts], 1)
        return type("Output", (), {"logits": logits})

    call.named_parameters = model.named_parameters  # type: ignore[attr-defined]
    return _results(call, inputs, counts)


def _error(found: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """Of the norm, relative to that of `scale`, which is `exact` by default."""
    if not exact.isfinite().all():
        raise AssertionError("the reference is not finite")
    return float((found.double() - exact).norm() / (exact if scale is None else scale).double().norm())


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_logits_and_gradients_are_those_of_the_eager_model(name: str, batch: str, device: str) -> None:
    inputs, counts = _inputs(name, batch, device)
    eager = _alone if batch == "packed" else _results
    exact = eager(_model(name, "eager", torch.float32, device), inputs, counts)
    rounded = eager(_model(name, "eager", torch.bfloat16, device), inputs, counts)
    ours = _results(_model(name, "flash_attention_2", torch.bfloat16, device), inputs, counts)
    assert ours.keys() == exact.keys()
    for key, value in exact.items():
        # The gradient of a bias is a sum over tokens, of keys even zero: only that of its weights says what is small.
        scale = exact.get(key.removesuffix("bias") + "weight", value)
        allowed, error = 2 * _error(rounded[key], value, scale) + FLOOR, _error(ours[key], value, scale)
        assert error <= allowed, f"{key}: {error:.1e} > {allowed:.1e}"


@needs_introspection
@pytest.mark.parametrize(("name", "batch"), CASES)
def test_every_layer_calls_this_package(name: str, batch: str, device: str) -> None:
    inputs, _ = _inputs(name, batch, device)
    model = _model(name, "flash_attention_2", torch.bfloat16, device)
    attentions = 6 if name == "BART" else 2
    assert len(flash_attn.explain(lambda: model(**inputs)).calls) == attentions


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", ["plain", "left"])
@pytest.mark.parametrize("name", [*DECODERS, "BART"])
def test_generate_takes_the_words_of_the_eager_model(name: str, batch: str, cache: str, device: str) -> None:
    """Each word is the eager model's best, or as good but for rounding, and the scores are its scores."""
    if cache == "static" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("Transformers 4 gives this attention all of a static cache, as if it were full")
    inputs, _ = _inputs(name, batch, device)
    inputs.pop("decoder_input_ids", None)
    models = {dtype: _model(name, "eager", dtype, device).eval() for dtype in (torch.float32, torch.bfloat16)}
    model = _model(name, "flash_attention_2", torch.bfloat16, device).eval()
    new = 12
    found = model.generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    scores = {dtype: _forced(eager, inputs, found.sequences, new) for dtype, eager in models.items()}
    exact = scores[torch.float32]
    ours = torch.stack(found.logits, 1)
    allowed = 2 * _error(scores[torch.bfloat16], exact) + FLOOR
    assert _error(ours, exact) <= allowed
    words = found.sequences[:, -new:]
    behind = exact.amax(-1) - exact.gather(-1, words[..., None])[..., 0]
    assert float(behind.max()) <= 8 * allowed * float(exact.std())


@torch.no_grad()
def _forced(model: Any, inputs: dict[str, Tensor], sequences: Tensor, new: int) -> Tensor:
    """The model's logits (batch, new, words) before each of the last `new` words of the sequences."""
    if model.config.is_encoder_decoder:
        return model(**inputs, decoder_input_ids=sequences).logits[:, -new - 1 : -1]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate counts them
    return model(sequences, attention_mask=mask, position_ids=positions).logits[:, -new - 1 : -1]
