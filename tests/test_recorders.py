"""What records attention instead of running it: torch.fx, torch.jit, torch.export and the ONNX exporters."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_attn
from flash_attn import explain, replace_sdpa
from introspection import needs_introspection


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.projection(x)
        return F.scaled_dot_product_attention(q, q, y, is_causal=True) * 2


class AttendsByOurs(Attends):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.projection(x)
        return flash_attn.scaled_dot_product_attention(q, q, y, is_causal=True) * 2


class SelfAttends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)


@needs_introspection
def test_fx_records_the_function_that_was_called() -> None:
    model, inputs = Attends(), _inputs()
    expected = model(*inputs)
    with replace_sdpa():
        graph = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(graph(*inputs), expected)
        assert explain(graph, *inputs).calls
    torch.testing.assert_close(graph(*inputs), expected)
    assert not explain(graph, *inputs).calls  # it looks for the replacement when it runs
    for node in graph.graph.nodes:
        node.type = None  # torch can't pickle annotations that are strings
    graph.recompile()
    torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(*inputs), expected)
    ours = torch.fx.symbolic_trace(AttendsByOurs())
    assert explain(ours, *inputs).calls


def _saved(module: torch.jit.ScriptModule) -> Any:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def test_jit_records_torchs_function_so_that_it_can_be_loaded_anywhere() -> None:
    model, inputs, x = Attends(), _inputs(), torch.randn(2, 5, 8)
    with replace_sdpa():
        for module, arguments in ((model, inputs), (SelfAttends(), (x,))):
            for record in (torch.jit.trace, lambda m, _: torch.jit.script(m)):
                recorded = _saved(record(module, arguments))
                assert "aten::scaled_dot_product_attention" in str(recorded.inlined_graph)
                torch.testing.assert_close(recorded(*arguments), module(*arguments))


def test_a_traced_call_of_ours_is_one_op() -> None:
    model = AttendsByOurs()
    traced = _saved(torch.jit.trace(model, _inputs()))
    assert "flash_attn::forward" in str(traced.inlined_graph)
    for length in (3, 5, 9):
        x, y = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
        torch.testing.assert_close(traced(x, y), model(x, y))
        results = [torch.autograd.grad(f(x, y).sum(), f.projection.weight)[0] for f in (traced, model)]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("onnx", [False, True])
def test_export_records_ours_but_for_onnx(strict: bool, onnx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if onnx:
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model, inputs = Attends(), _inputs()
    with replace_sdpa():
        program = torch.export.export(model, inputs, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("flash_attn.forward.default" in targets) != onnx
    assert ("aten.scaled_dot_product_attention.default" in targets) == onnx
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_models_go_to_onnx(dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    file = io.BytesIO()
    with replace_sdpa():
        torch.onnx.export(Attends().eval(), _inputs(), file, dynamo=dynamo)
    kinds = {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}
    assert "Softmax" in kinds
