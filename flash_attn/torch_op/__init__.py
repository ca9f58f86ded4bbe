"""The torch ops of this package as Python sees them.

`flash_attn::forward` and `flash_attn::backward`: `attention` has the one function that every public function calls,
`arguments` their arguments, in order, `library` the op library and fake kernels, and `registered` what else torch asks
of an op. Eager calls of q, k, v and perhaps a mask go by `plain`, those that require grad by `extension`. `cache` and
`rotary` have the other ops, but for those on masks (`flash_attn.masks`).

For all of them: `checks`, types of what is given; `observer`, calls that are seen instead of made; `private`, what
torch has no public name for.
"""
