"""`apply_rotary` under the name by which others import it; see `flash_attn.layers.rotary`."""

from __future__ import annotations

from flash_attn.layers.rotary import apply_rotary

__all__ = ["apply_rotary"]
