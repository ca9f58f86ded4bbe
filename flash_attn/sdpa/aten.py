"""Our kernels under torch's own ops for attention, which `replace_sdpa(level="aten")` puts there."""

from __future__ import annotations

import ctypes
import threading

import torch

from ..torch_op import private
from ..torch_op.library import LIBRARY

_QKV = "Tensor query, Tensor key, Tensor value"
_LENGTHS = "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k"
_SAVED = f"(Tensor grad_out, {_QKV}, Tensor out, Tensor logsumexp, "
_GRADIENTS = "(Tensor grad_query, Tensor grad_key, Tensor grad_value)"
_SCHEMAS = {  # that csrc/ops/override.cpp is written for
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": f"({_QKV}, float dropout_p=0., bool is_causal=False, *, "
        "Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
        "_scaled_dot_product_flash_attention_for_cpu_backward": f"{_SAVED}float dropout_p, bool is_causal, *, "
        f"Tensor? attn_mask=None, float? scale=None) -> {_GRADIENTS}",
    },
    "CUDA": {
        "_scaled_dot_product_flash_attention": f"({_QKV}, float dropout_p=0., bool is_causal=False, "
        f"bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, {_LENGTHS}, "
        "Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
        "_scaled_dot_product_flash_attention_backward": f"{_SAVED}{_LENGTHS}, float dropout_p, bool is_causal, "
        f"Tensor philox_seed, Tensor philox_offset, *, float? scale=None) -> {_GRADIENTS}",
        "_scaled_dot_product_efficient_attention": f"({_QKV}, Tensor? attn_bias, bool compute_log_sumexp, "
        "float dropout_p=0., bool is_causal=False, *, float? scale=None) -> (Tensor output, Tensor log_sumexp, "
        "Tensor philox_seed, Tensor philox_offset)",
        "_scaled_dot_product_efficient_attention_backward": f"(Tensor grad_out_, {_QKV}, Tensor attn_bias, Tensor out, "
        "Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, float dropout_p, bool[4] grad_input_mask, "
        "bool is_causal=False, *, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
        "_scaled_dot_product_cudnn_attention": f"({_QKV}, Tensor? attn_bias, bool compute_log_sumexp, "
        "float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> "
        f"(Tensor output, Tensor logsumexp, {_LENGTHS}, Tensor philox_seed, Tensor philox_offset, "
        "Tensor debug_attn_mask)",
        "_scaled_dot_product_cudnn_attention_backward": f"{_SAVED}Tensor philox_seed, Tensor philox_offset, "
        f"Tensor attn_bias, {_LENGTHS}, float dropout_p, bool is_causal, *, float? scale=None) -> "
        "(Tensor, Tensor, Tensor)",
    },
}

_lock = threading.Lock()
_needed = 0


def _devices() -> list[str]:
    """Those whose kernels torch has."""
    return ["CPU", "CUDA"] if torch.version.cuda is not None else ["CPU"]


def override() -> None:
    """Puts our kernels there for the whole process, until `restore` has been called as often as this.

    Raises:
        NotImplementedError: this torch's ops have other schemas than those that the kernels are written for.
    """
    global _needed
    with _lock:
        if not _needed:
            changed = [name for device in _devices() for name in private.changed_ops(_SCHEMAS[device])]
            if changed:
                raise NotImplementedError(
                    f"level must be 'function' with torch {torch.__version__}, whose aten::{changed[0]} has other "
                    "arguments or results than the kernels for level='aten' were written for"
                )
            for device in _devices():
                ctypes.CDLL(str(LIBRARY)).flash_attn_override(device.encode())
        _needed += 1


def restore() -> None:
    global _needed
    with _lock:
        _needed -= 1
        if not _needed:
            for device in _devices():
                ctypes.CDLL(str(LIBRARY)).flash_attn_restore(device.encode())
