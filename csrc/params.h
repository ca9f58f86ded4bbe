// The only thing that passes between the ops and a kernel: one problem, its data and its options. Plain data, no torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "tensor_view.h"

namespace flash_attn {

enum class Causal : int32_t { kNone = 0, kTopLeft = 1, kBottomRight = 2 };

/// attn_mask, broadcast to (batch, num_heads, seqlen_q, seqlen_k); a stride of 0 broadcasts. Rows and columns count
/// from the start of their own sequence, also with cu_seqlens.
struct MaskView {
  void* data = nullptr;
  DType dtype = DType::kOther;  // kBool: true takes part; floating: added to the scores
  int64_t batch = 0, head = 0, row = 0, col = 0;
  // Sizes before broadcasting: 1 where broadcast. The gradient has this shape.
  int64_t batch_size = 1, head_size = 1, row_size = 1, col_size = 1;
  // The mask read before (packed_mask.h); null: not yet. A boolean mask's `data` are not read then: they need not hold
  // it.
  void* packed = nullptr;
};

/// Type of softmax statistics and of everything that is not q, k, v: double for double inputs, float for all others.
constexpr DType statistics_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

/// k and v as a cache that sequences have parts of: see key_rows() in sequence.h.
struct CacheView {
  const int32_t* batch_index = nullptr;  // (batch): a sequence's entry of the cache; null: its own number
  const int32_t* first = nullptr;        // (batch): rows before it take no part; null: 0
  const int32_t* block_table = nullptr;  // (batch, blocks): the entry (page) of each page_size rows; null: no pages
  int64_t table_stride = 0, page_size = 0;
  int64_t entries = 0;   // sequences or pages in the cache; 0: k and v are no cache
  int64_t appended = 0;  // rows that seqused_k does not count yet

  FLASH_ATTN_HOST_DEVICE bool exists() const { return entries > 0; }
};

struct ForwardParams {
  // Tensors. Element type `dtype`; lse, slopes and sinks are of statistics_dtype(dtype).
  TensorView q;    // (batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)
  TensorView k;    // (batch, seqlen_k, num_heads_k, head_dim) or (total_k, ...)
  TensorView v;    // (batch, seqlen_k, num_heads_k, head_dim_v) or (total_k, ...)
  TensorView out;  // as q, with head_dim_v
  RowView lse;     // (batch, num_heads, seqlen_q) or (num_heads, total_q); natural logarithm, -inf for an empty row

  DType dtype = DType::kOther;
  DeviceType device = DeviceType::kCPU;
  int device_index = 0;

  int64_t batch = 0, num_heads = 0, num_heads_k = 0;  // query head h reads key head h / (num_heads / num_heads_k)
  int64_t seqlen_q = 0, seqlen_k = 0;                 // of every sequence; with cu_seqlens no sequence is longer
  int64_t total_q = 0, total_k = 0;                   // rows of q and of k; batch * seqlen without cu_seqlens
  int64_t head_dim = 0, head_dim_v = 0;

  // Scores: softcap(softmax_scale * q.k) + mask - slope * |row + diagonal - col|, then masks.
  double softmax_scale = 1.0;
  double softcap = 0.0;  // 0: off
  // Row i stands at column c = i + diagonal (0 for kTopLeft, else seqlen_k - seqlen_q of its sequence) and sees columns
  // [c - window_left, c + window_right]; -1 is unlimited. Causal attention has window_right = 0.
  Causal causal = Causal::kNone;
  int64_t window_left = -1, window_right = -1;

  MaskView mask;                       // data null: none
  const void* alibi_slopes = nullptr;  // (num_heads) or (batch, num_heads), see the strides
  int64_t alibi_batch_stride = 0, alibi_head_stride = 0;
  const void* sinks = nullptr;  // (num_heads), contiguous

  // Lengths, int32 on the tensors' device; null: dense.
  const int32_t* cu_seqlens_q = nullptr;  // (batch + 1)
  const int32_t* cu_seqlens_k = nullptr;  // (batch + 1)
  const int32_t* seqused_q = nullptr;     // (batch)
  const int32_t* seqused_k = nullptr;     // (batch)

  double dropout_p = 0.0;              // 0: off
  const int64_t* rng_state = nullptr;  // (2): seed, offset; see philox.h

  bool deterministic = false;

  CacheView cache;  // where it exists, batch strides of k and v go from entry to entry

  void* workspace = nullptr;  // as many bytes as the kernel's plan asks for; contents undefined on entry

  bool is_varlen_q() const { return cu_seqlens_q != nullptr; }
  bool is_varlen_k() const { return cu_seqlens_k != nullptr; }
  /// No lengths: every sequence has seqlen_q and seqlen_k rows.
  bool is_dense() const { return !is_varlen_q() && !is_varlen_k() && seqused_q == nullptr && seqused_k == nullptr; }
  bool has_window() const { return window_left >= 0 || window_right >= 0; }  // causal included
  bool has_bool_mask() const { return mask.data != nullptr && mask.dtype == DType::kBool; }
  bool has_bias() const { return mask.data != nullptr && mask.dtype != DType::kBool; }
  int64_t group_size() const { return num_heads_k > 0 ? num_heads / num_heads_k : 1; }
};

/// Gradients. `forward` holds the inputs and also out and lse, as the forward pass returned them. A null output pointer
/// means that this gradient is not wanted. Every wanted output is written in full: rows that no query or key uses get
/// 0.
struct BackwardParams {
  ForwardParams forward;
  TensorView dout;  // as out
  RowView dlse;     // as lse; data null: no gradient comes through lse
  TensorView dq;    // as q
  TensorView dk;    // as k
  TensorView dv;    // as v
  // Of statistics_dtype, contiguous:
  void* dmask = nullptr;    // (mask.batch_size, mask.head_size, mask.row_size, mask.col_size)
  void* dslopes = nullptr;  // (num_heads), or (batch, num_heads) when alibi_batch_stride is not 0
  void* dsinks = nullptr;   // (num_heads)
  bool slopes_have_batch = false;
};

}  // namespace flash_attn
