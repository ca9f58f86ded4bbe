"""Where others look for `flash_attn.ops.triton.rotary`; nothing here needs Triton."""
