"""Layers of Dao's flash_attn that belong to attention: `flash_attn.layers.rotary`."""
