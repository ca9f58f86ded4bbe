// The ops of the library flash_attn, as the dispatcher calls them: arguments are taken from `stack` in the order of the
// schema, and results put there.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <vector>

#include "torch/stack.h"

namespace flash_attn {

void forward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void backward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
/// The same of q, k and v alone, whose three gradients are all wanted.
void plain_forward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
/// With a mask, which may have fewer than four dimensions.
void masked_forward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void plain_backward(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

/// Out and lse, not yet filled or filled.
struct Results {
  Tensor out, lse;
};

/// The gradients that are wanted, in the order of `needs`.
struct Gradients {
  OptionalTensor dq, dk, dv, dmask, dslopes, dsinks;
};

/// Both passes of whatever `inputs` describe. With lse_is_read false there may be no lse; where `lse` is given,
/// (batch, num_heads, seqlen_q) of any strides, it is written there and not returned. `needs`: q, k, v, attn_mask,
/// alibi_slopes, sinks.
Results attend(const Inputs& inputs, bool lse_is_read = true, const Tensor* lse = nullptr);
Gradients differentiate(const Inputs& inputs, Tensor& dout, const OptionalTensor& dlse, Tensor& out, const Tensor& lse,
                        const std::vector<bool>& needs);

/// What forward returns for who keeps it for backward; of dropout its state, else that is undefined.
struct PlainResults {
  Tensor out, lse, rng_state;
};

/// What the plain ops compute, for who takes arguments of another schema, which may have a mask and dropout, whose
/// state is drawn. The results are undefined where the inputs should fit and do not, and gradients (q, k, v, mask)
/// where `needs` (these, and false twice) does not want them.
PlainResults attend_plain(Inputs& inputs, const PlainOptions& options);
std::array<Tensor, 4> differentiate_plain(const Inputs& inputs, Tensor& dout, Tensor& out, const Tensor& lse,
                                          const std::vector<bool>& needs);

/// Reads a mask once, see packed_mask.h.
void pack_mask(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

}  // namespace flash_attn
