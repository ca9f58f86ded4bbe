"""The op library's promises to the dynamic linker: one build for any torch >= 2.11 and any Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import torch

from flash_attn.torch_op.arguments import Options, Tensors
from flash_attn.torch_op.library import (
    LIBRARY,
    backward_op,
    forward_op,
    masked_forward_op,
    plain_backward_op,
    plain_forward_op,
)

reads_elf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")

_ALLOWED = re.compile(
    r"lib(torch|torch_cpu|c10|stdc\+\+|m|gcc_s|c|dl|rt|pthread|asan|ubsan)\.so[.\d]*|ld-linux[\w-]*\.so[.\d]*"
)


def _read(option: str) -> str:
    return subprocess.run(["readelf", option, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


@reads_elf
def test_it_needs_libtorch_and_nothing_of_cuda_or_python() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", _read("-dW"))
    assert "libtorch.so" in needed
    assert [name for name in needed if not _ALLOWED.fullmatch(name)] == []


@reads_elf
def test_what_it_takes_from_torch_is_the_stable_c_interface() -> None:
    lines = [line.split() for line in _read("-sW").splitlines() if " UND " in line]
    undefined = [line[-1].split("@")[0] for line in lines]
    mangled = {line[-1]: line[4] for line in lines if re.match(r"_ZNK?(3c10|2at|5torch)", line[-1])}
    asked = (  # not needed to load: csrc/ops/torch/deterministic.cpp, below_autograd.cpp
        "_ZN2at13globalContextEv",
        "_ZNK2at7Context23deterministicAlgorithmsEv",
        "_ZN3c1016parseDispatchKeyERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
        "_ZN3c104impl28tls_is_dispatch_key_excludedENS_11DispatchKeyE",
        "_ZN3c104impl29tls_set_dispatch_key_excludedENS_11DispatchKeyEb",
    )
    assert mangled == dict.fromkeys(asked, "WEAK"), "C++ symbols of torch change from release to release"
    assert [name for name in undefined if name.startswith(("Py", "_Py", "cuda", "cu"))] == []
    assert any(name.startswith("aoti_torch_") for name in undefined)


@reads_elf
def test_the_stream_of_cuda_is_a_weak_symbol() -> None:
    lines = [line for line in _read("-sW").splitlines() if "aoti_torch_get_current_cuda_stream" in line]
    if not lines:
        pytest.skip("built without CUDA kernels")
    assert all("WEAK" in line for line in lines)


@reads_elf
def test_it_exports_nothing_of_the_cuda_runtime() -> None:
    exported = [
        line.split()[-1] for line in _read("--dyn-syms").splitlines() if " GLOBAL " in line and " UND " not in line
    ]
    assert [name for name in exported if name.startswith("cuda")] == []


def test_its_schemas_and_the_named_tuples_of_python_agree() -> None:
    def names(op: torch._ops.OpOverload) -> list[str]:
        return [argument.name for argument in op._schema.arguments]

    assert names(forward_op) == [*Tensors._fields, *Options._fields]
    assert names(backward_op) == ["dout", "dlse", *Tensors._fields, "out", "lse", "needs", *Options._fields]
    assert names(plain_forward_op) == ["q", "k", "v", "softmax_scale", "options"]
    assert names(masked_forward_op) == ["q", "k", "v", "attn_mask", "softmax_scale", "options"]
    assert names(plain_backward_op) == ["dout", "q", "k", "v", "out", "lse", "softmax_scale", "options"]


_IMPORT_TWICE = """
import sys, torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

def check(attend):
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    loss = lambda f: (lambda x: f(x, x, x).square().sum())
    expected = torch.autograd.grad(loss(F.scaled_dot_product_attention)(x), x)[0]
    with FlopCounterMode(display=False) as flops:
        torch.testing.assert_close(torch.autograd.grad(loss(attend)(x), x)[0], expected)
    assert flops.get_total_flops() == 2 * 2 * 5 * 5 * 8 * 7
    torch.testing.assert_close(torch.func.grad(loss(attend))(x.detach()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss(attend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)

functions = []
for _ in range(3):
    import flash_attn
    functions.append(flash_attn.scaled_dot_product_attention)
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
assert functions[0] is not functions[1]
for function in functions:
    check(function)
"""


def test_importing_again_after_a_purge_of_modules() -> None:
    command = [sys.executable, "-W", "error", "-c", _IMPORT_TWICE]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")  # not the clone, which hides the package
    assert done.returncode == 0, done.stderr
