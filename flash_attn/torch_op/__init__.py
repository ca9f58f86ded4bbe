"""The torch ops `flash_attn::forward` and `flash_attn::backward` as Python sees them.

`arguments`: their arguments, in order; `library`: the op library, fake kernels, FLOP formulas; `autograd`: derivatives;
`vmap`: batching rules; `attention`: the one function that every public function calls; `private`: what torch has no
public name for.
"""
