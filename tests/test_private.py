"""Each name that torch may take away: attention works without it. Nothing else in the package uses private names."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn
from flash_attn.torch_op import private

NAMES = [
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._are_functorch_transforms_active",
    "torch._C._dispatch_tls_is_dispatch_key_included",
    "torch._C._get_flash_sdp_enabled",
    "torch._C._get_sdp_priority_order",
    "torch._C._is_key_in_tls",
    "torch._C._is_tracing",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._nn.scaled_dot_product_attention",
    "torch.autograd.forward_ad._current_level",
    "torch.jit._builtins._register_builtin",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch._functorch.utils.enable_single_level_autograd_function",
    "torch._C._vmapmode_increment_nesting",
]


@pytest.fixture(params=NAMES)
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as if torch had not had the name when it was imported. It comes back then: torch itself needs it."""
    owner, name = request.param.rsplit(".", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(functools.reduce(getattr, owner.split(".")[1:], torch), name)
        spec = importlib.util.spec_from_file_location("bare", private.__file__)
        assert spec is not None and spec.loader is not None
        bare = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bare)
    replaced = [(x, getattr(bare, n)) for n, x in vars(private).items() if callable(x) and n not in ("Tensor", "cast")]
    for module in [m for n, m in sys.modules.items() if n.startswith("flash_attn.")]:
        for n, x in list(vars(module).items()):
            for old, new in replaced:
                if x is old:
                    monkeypatch.setattr(module, n, new)


@pytest.mark.usefixtures("without")
def test_attention_works_without() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def gradients(attend: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(attend(*leaves, is_causal=True).square().sum(), leaves)

    def per_sample(attend: Callable[..., Tensor]) -> Any:
        return torch.vmap(torch.func.grad(lambda x: attend(x, k, v).square().sum()))(torch.stack((q, k, v)))

    def mapped(attend: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, torch.stack((q, k)), is_grads_batched=True)

    torchs, ours = F.scaled_dot_product_attention, flash_attn.scaled_dot_product_attention
    torch.testing.assert_close(ours(q, k, v), torchs(q, k, v))
    torch.testing.assert_close(gradients(ours), gradients(torchs))
    torch.testing.assert_close(per_sample(ours), per_sample(torchs))
    torch.testing.assert_close(mapped(ours), mapped(torchs))
    with sdpa_kernel(SDPBackend.MATH):
        second = torch.func.jvp(torch.func.grad(lambda x: torchs(x, k, v).square().sum()), (q,), (q,))
    torch.testing.assert_close(
        torch.func.jvp(torch.func.grad(lambda x: ours(x, k, v).square().sum()), (q,), (q,)), second
    )
    with flash_attn.replace_sdpa():
        replaced = F.scaled_dot_product_attention
        torch.testing.assert_close(gradients(replaced), gradients(torchs))
        with sdpa_kernel(SDPBackend.MATH):
            assert not flash_attn.explain(replaced, q, k, v).calls


def test_functions_work_without_a_way_past_apply() -> None:
    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, dx: Tensor) -> Tensor:
            return dx * 2

    x = torch.ones(2, requires_grad=True)
    for apply in (private.apply_of(Named), Named.apply):
        assert torch.equal(torch.autograd.grad(apply(x).sum(), x)[0], torch.full((2,), 2.0))


def test_a_jagged_tensor_is_read_without_what_it_keeps_to_itself() -> None:
    parts = [torch.randn(n, 2, 8) for n in (3, 1, 4)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for y in (x, x.transpose(1, 2)):
        public = SimpleNamespace(shape=y.shape, offsets=y.offsets)
        assert private.ragged_dim(public) == private.ragged_dim(y)  # type: ignore[arg-type]
        assert private.longest(public) == private.longest(y) == 4


def test_private_names_stand_in_one_module() -> None:
    package = Path(flash_attn.__file__).parent
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if path != Path(private.__file__)
        for line in path.read_text().splitlines()
        if re.search(r"\btorch(\.\w+)*\._[a-zA-Z]|from torch[\w.]* import _|import torch[\w.]*\._", line)
    ]
    assert found == []


def test_symbols_are_read_with_and_without_what_they_keep_to_themselves() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    environment = ShapeEnv()
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    x = FakeTensorMode(shape_env=environment).from_tensor(torch.empty(6, 7), symbolic_context=dynamic)
    later, (rows, columns) = environment.create_unbacked_symint(), x.shape
    for known, value in ((3, 3), (rows, 6), (rows * columns + 1, 43), (torch.sym_float(rows) / 4, 1.5)):
        assert private.is_known(known) and private.example_value(known) == value
    assert environment.guards == []  # the symbols may be anything else
    for unknown in (later, later * rows, later + 1):
        assert not private.is_known(unknown)
    assert private.typical_value(rows) == 6 < private.typical_value(later)
    assert private.typical_value(later * rows) == 6 * private.typical_value(later)
    bare = torch.SymInt(SimpleNamespace())
    assert not private.is_known(bare) and private.typical_value(bare) == private.typical_value(later)
