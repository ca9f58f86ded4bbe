"""Where others look for Dao's `flash_attn.ops.triton` and the like; flash_attn/missing.py says what is not here.

The torch ops of this package are in `flash_attn.torch_op`.
"""
