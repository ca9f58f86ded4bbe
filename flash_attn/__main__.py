"""`python -m flash_attn`: versions, devices, kernels, and a short self-check."""

from __future__ import annotations

import importlib
import itertools
import sys

import torch

import flash_attn
from flash_attn.torch_op.library import LIBRARY


def _print_build() -> None:
    _C = importlib.import_module("flash_attn._C")
    info = _C.build_info()
    print(f"flash_attn {flash_attn.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"library     {LIBRARY}")
    print(f"built with  {info['compiler']}, headers of torch {info['torch_headers']}")
    if info["cuda"]:
        print(f"CUDA        built with {info['cuda']} for {info['cuda_archs']}: {info['cuda_reason']}")
    else:
        print(f"CUDA        not built: {info['cuda_reason']}")
    for device, (forward, backward) in _C.kernels().items():
        print(f"kernels     {device}: forward {', '.join(forward)}; backward {', '.join(backward)}")


def _devices() -> list[str]:
    kernels = importlib.import_module("flash_attn._C").kernels()
    devices = ["cpu"]
    print(f"device      cpu: {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        print("device      no CUDA device that torch can use")
        return devices
    for i in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        print(f"device      cuda:{i}: {torch.cuda.get_device_name(i)}, compute capability {capability}")
    if "cuda" in kernels:
        devices.append("cuda")
    return devices


def _error(device: str, dtype: torch.dtype, causal: bool, head_dim: int) -> float:
    """Largest relative error of out, dq, dk and dv against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 133, head_dim, dtype=torch.float64, generator=generator).to(dtype) for _ in range(3)]
    weight = torch.randn(2, 3, 133, head_dim, dtype=torch.float64, generator=generator)
    exact = [x.double().requires_grad_() for x in inputs]
    ours = [x.to(device).requires_grad_() for x in inputs]
    scores = exact[0] @ exact[1].transpose(-1, -2) / head_dim**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(133, 133, dtype=torch.bool).tril(), float("-inf"))
    expected = scores.softmax(-1) @ exact[2]
    q, k, v = ours
    got = flash_attn.scaled_dot_product_attention(q, k, v, is_causal=causal)
    pairs = [(expected, got)]
    pairs += zip(
        torch.autograd.grad((expected * weight).sum(), exact),
        torch.autograd.grad((got.double() * weight.to(device)).sum(), ours),
        strict=True,
    )
    return max(float((a - b.double().cpu()).detach().norm() / a.detach().norm()) for a, b in pairs)


_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _self_check(devices: list[str]) -> bool:
    cases = list(itertools.product(devices, _TOLERANCE, (False, True), (40, 64, 128)))
    failures = []
    terminal = sys.stdout.isatty()
    for done, (device, dtype, causal, head_dim) in enumerate(cases, 1):
        error = _error(device, dtype, causal, head_dim)
        if not error <= _TOLERANCE[dtype]:
            failures.append(f"{device} {dtype} causal={causal} head_dim={head_dim}: error {error:.1e}")
        if terminal:
            bar = "#" * (40 * done // len(cases))
            print(f"\rself-check  [{bar:<40}] {done}/{len(cases)}", end="", flush=True)
    start = "\r\033[K" if terminal else ""
    print(f"{start}self-check  {len(cases) - len(failures)} of {len(cases)} all right")
    for failure in failures:
        print(f"WRONG       {failure}")
    return not failures


def main() -> int:
    _print_build()
    return 0 if _self_check(_devices()) else 1


if __name__ == "__main__":
    sys.exit(main())
