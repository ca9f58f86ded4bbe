"""Where others look for `flash_attn.ops.triton.rotary`; flash_attn/missing.py says what else of theirs is not here.

The torch ops of this package are in `flash_attn.torch_op`.
"""
