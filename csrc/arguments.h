// From what a caller passes to what a kernel takes. Every refusal that can be made on the host is made here, before
// anything is allocated or launched, and names the argument, what came and what is accepted.
#pragma once

#include <optional>
#include <string>

#include "host_device.h"
#include "params.h"

namespace flash_attn {

/// The arguments of flash_attn::forward, in the order of its schema.
struct Arguments {
  TensorInfo q;  // (batch, seqlen_q, num_heads, head_dim), with heads_first (batch, num_heads, seqlen_q, head_dim),
                 // with cu_seqlens_q (total_q, num_heads, head_dim)
  TensorInfo k;  // as q, with seqlen_k, num_heads_k and cu_seqlens_k
  TensorInfo v;  // as k, with head_dim_v
  std::optional<TensorInfo> attn_mask;                   // (batch | 1, num_heads | 1, seqlen_q | 1, seqlen_k | 1)
  std::optional<TensorInfo> alibi_slopes;                // (num_heads) or (batch, num_heads)
  std::optional<TensorInfo> sinks;                       // (num_heads)
  std::optional<TensorInfo> cu_seqlens_q, cu_seqlens_k;  // (batch + 1)
  std::optional<TensorInfo> seqused_q, seqused_k;        // (batch)
  std::optional<TensorInfo> rng_state;                   // (2)
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;            // read with cu_seqlens only
  std::optional<double> softmax_scale;                   // 1 / sqrt(head_dim)
  int64_t causal = 0;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0.0, dropout_p = 0.0;
  bool heads_first = false, deterministic = false;
};

/// Checks everything and fills all but out, lse and workspace. Lengths in cu_seqlens and seqused are checked too when
/// they are in host memory and `read_lengths` is true.
FLASH_ATTN_EXPORT ForwardParams make_forward_params(const Arguments& arguments, bool read_lengths = true);

/// "(2, 8, 128, 64)"
std::string shape_string(const TensorInfo& tensor);
const char* dtype_name(DType dtype);

/// Views of a tensor that has passed the checks.
FLASH_ATTN_EXPORT TensorView tensor_view(const TensorInfo& tensor, bool heads_first);
RowView row_view(const TensorInfo& tensor);

/// Strides of a dense tensor with the sizes of `like`, but `last` columns, whose dimensions lie in memory in the order
/// of `like`'s; the last one is always contiguous, and broadcast ones (stride 0) are outermost.
FLASH_ATTN_EXPORT void dense_strides_like(const TensorInfo& like, int64_t last, int64_t* strides);

}  // namespace flash_attn
