"""The torch ops `flash_attn::forward` and `flash_attn::backward` as Python sees them.

`arguments`: their arguments, in order; `library`: the op library and fake kernels; `flops`: how much they compute;
`refusals`: those of tensors without data; `autograd`: derivatives; `vmap`: batching rules; `attention`: the one
function that every public function calls, but for eager calls of q, k and v alone: they go by `plain`; `checks`: types
of what it is given; `observer`: calls that are seen instead of made; `private`: what torch has no public name for.
"""
