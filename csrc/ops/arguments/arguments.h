// The arguments of the ops, once for all who pass them on, and the way from what a caller passes to what a kernel
// takes. Every refusal that can be made on the host is made here, before anything is allocated or launched, and names
// the argument, what came and what is accepted.
#pragma once

#include <optional>
#include <vector>

#include "../../host_device.h"
#include "../../params.h"
#include "../tensor_info.h"

namespace flash_attn {

/// The arguments of flash_attn::forward. A new one is a member and a line in the list below; flash_attn/torch_op has
/// its twin in arguments.py.
struct Arguments {
  TensorInfo q;  // (batch, seqlen_q, num_heads, head_dim), with heads_first (batch, num_heads, seqlen_q, head_dim),
                 // with cu_seqlens_q (total_q, num_heads, head_dim)
  TensorInfo k;  // as q, with seqlen_k, num_heads_k and cu_seqlens_k
  TensorInfo v;  // as k, with head_dim_v
  std::optional<TensorInfo> attn_mask;                   // (batch | 1, num_heads | 1, seqlen_q | 1, seqlen_k | 1)
  std::optional<TensorInfo> alibi_slopes;                // (num_heads) or (batch, num_heads)
  std::optional<TensorInfo> sinks;                       // (num_heads)
  std::optional<TensorInfo> packed_mask;                 // attn_mask, read before by pack_mask
  std::optional<TensorInfo> cu_seqlens_q, cu_seqlens_k;  // (batch + 1)
  std::optional<TensorInfo> seqused_q, seqused_k;        // (batch)
  std::optional<TensorInfo> rng_state;                   // (2)
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;            // bounds, read with cu_seqlens only
  std::optional<double> softmax_scale;                   // 1 / sqrt(head_dim)
  int64_t causal = 0;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0.0, dropout_p = 0.0;
  bool heads_first = false, deterministic = false;

  /// visit(name, tensor), in the order of the schema. Those that are not optional must be given.
  template <typename Visit>
  constexpr void for_each_tensor(const Visit& visit) {
    visit("q", q);
    visit("k", k);
    visit("v", v);
    visit("attn_mask", attn_mask);
    visit("alibi_slopes", alibi_slopes);
    visit("sinks", sinks);
    visit("packed_mask", packed_mask);
    visit("cu_seqlens_q", cu_seqlens_q);
    visit("cu_seqlens_k", cu_seqlens_k);
    visit("seqused_q", seqused_q);
    visit("seqused_k", seqused_k);
    visit("rng_state", rng_state);
  }
  static constexpr int kDifferentiable = 6;  // the first of them

  /// visit(name, type in the schema, value), in the order of the schema, after the tensors. With `int` for lengths
  /// torch.compile would compile anew for each, with `SymInt` once.
  template <typename Visit>
  constexpr void for_each_option(const Visit& visit) {
    visit("max_seqlen_q", "SymInt", max_seqlen_q);
    visit("max_seqlen_k", "SymInt", max_seqlen_k);
    visit("softmax_scale", "float?", softmax_scale);
    visit("causal", "int", causal);
    visit("window_left", "SymInt", window_left);
    visit("window_right", "SymInt", window_right);
    visit("softcap", "float", softcap);
    visit("dropout_p", "float", dropout_p);
    visit("heads_first", "bool", heads_first);
    visit("deterministic", "bool", deterministic);
  }
};

/// The options that the plain ops take, as one number: torch spends more on four arguments than on what they say.
/// flash_attn/torch_op/arguments.py has its twin.
struct PlainOptions {
  int64_t causal;
  bool heads_first, deterministic;
  bool if_they_fit;   // forward returns nothing where q, k and v do not, see fit_as_they_are()
  bool lse_is_read;   // else forward returns none
  bool shared_heads;  // by several heads of q

  explicit constexpr PlainOptions(int64_t number)
      : causal(number & 3),
        heads_first((number & 4) != 0),
        deterministic((number & 8) != 0),
        if_they_fit((number & 16) != 0),
        lse_is_read((number & 32) == 0),
        shared_heads((number & 64) != 0) {}
};

/// Whether q, k and v, as torch's function takes them, need no change of shape. Twin of the function of this name in
/// flash_attn/sdpa/shapes.py.
bool fit_as_they_are(const Arguments& arguments, bool shared_heads);

/// To be called where attn_mask has a gradient: that is of the shape which the mask was given in, expanded or not.
FLASH_ATTN_EXPORT void keep_shape_of_mask(const Arguments& arguments, ForwardParams& params);

/// A mask (batch | 1, heads | 1, seqlen_q | 1, seqlen_k | 1) as it lies.
MaskView mask_view(const TensorInfo& mask);

/// Checks everything and fills all but out, lse and workspace. Small tensors of one dimension are taken as contiguous.
/// Lengths in cu_seqlens and seqused are checked too when they are in host memory and `read_lengths` is true.
FLASH_ATTN_EXPORT ForwardParams make_forward_params(const Arguments& arguments, bool read_lengths = true);

/// What backward takes beside the arguments of forward.
struct Saved {
  TensorInfo dout;
  std::optional<TensorInfo> dlse;
  TensorInfo out, lse;
  std::vector<bool> needs;  // gradients wanted, of the differentiable tensors
};

/// Checks everything else that backward takes; `params` are those of the arguments.
FLASH_ATTN_EXPORT void check_saved(const Arguments& arguments, const ForwardParams& params, const Saved& saved);

}  // namespace flash_attn
