"""Tangents of attention and of its gradients, in memory linear in the sequence: what second derivatives and forward
mode are made of.

The two ops, `flash_attn::forward_jvp` and `flash_attn::backward_jvp`, are written in torch's own matrix products, one
tile of scores at a time: they run wherever torch does, at whatever precision of matrix products torch is set to.

| file | |
|---|---|
| `ops.py` | the two ops as torch has them |
| `tangents.py` | what they compute: the formulas, and the loop over tiles |
| `tile.py` | a tile of scores: what it sees, and its tangent |
| `parts.py` | the calls of one length that a call consists of, and how their tensors lie |
| `dropout.py` | which scores are kept, as csrc/philox.h draws them |
"""
