#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "../../mask_kind.h"
#include "checks.h"
#include "refuse.h"

namespace flash_attn {

namespace {

struct Shape {  // of q or of k and v, whatever the layout
  int64_t batch, rows, heads, columns;
};

Shape shape_of(const TensorInfo& tensor, bool packed, bool heads_first) {
  if (packed) return {-1, tensor.size[0], tensor.size[1], tensor.size[2]};
  const int row = heads_first ? 2 : 1, head = heads_first ? 1 : 2;
  return {tensor.size[0], tensor.size[row], tensor.size[head], tensor.size[3]};
}

void check_rank(const char* name, const TensorInfo& tensor, bool packed, bool heads_first) {
  const char* accepted = packed        ? "(total, heads, head_dim) with cu_seqlens"
                         : heads_first ? "(batch, heads, seqlen, head_dim)"
                                       : "(batch, seqlen, heads, head_dim)";
  if (tensor.ndim != (packed ? 3 : 4)) {
    refuse(name, " must be ", accepted, ", but has shape ", shape_string(tensor));
  }
}

void check_qkv(const Arguments& a, const Shape& q, const Shape& k, const Shape& v) {
  const DType dtype = a.q.dtype;
  check_dtype("q", dtype);
  if (a.k.dtype != dtype || a.v.dtype != dtype) {
    refuse("q, k and v must have the same dtype, but are ", dtype_name(dtype), ", ", dtype_name(a.k.dtype), " and ",
           dtype_name(a.v.dtype));
  }
  check_device("k", a.k, a.q);
  check_device("v", a.v, a.q);
  if (k.rows != v.rows || k.heads != v.heads || k.batch != v.batch) {
    refuse("k and v must have the same batch, seqlen and heads, but have shapes ", shape_string(a.k), " and ",
           shape_string(a.v));
  }
  if (q.columns != k.columns) {
    refuse("q and k must have the same head_dim, but have shapes ", shape_string(a.q), " and ", shape_string(a.k));
  }
  if (k.heads == 0 ? q.heads != 0 : q.heads % k.heads != 0) {
    refuse("the heads of k and v must divide those of q, but q has ", q.heads, " and k ", k.heads);
  }
}

/// cu_seqlens_q or cu_seqlens_k in host memory: from 0 on, nondecreasing, inside the tensor, no sequence over
/// max_seqlen. Rows behind the last sequence are allowed. Returns the longest.
int64_t check_lengths(const char* side, const int32_t* cu_seqlens, int64_t batch, int64_t total, int64_t max_seqlen) {
  if (cu_seqlens[0] != 0) refuse("cu_seqlens_", side, " must start with 0, but starts with ", cu_seqlens[0]);
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    if (end < begin || end > total) {
      refuse("cu_seqlens_", side, " must not decrease and lie in [0, ", total, "], but entries ", b, " and ", b + 1,
             " are ", begin, " and ", end);
    }
    if (end - begin > max_seqlen) {
      refuse("max_seqlen_", side, " must be at least the longest sequence, but is ", max_seqlen, " and sequence ", b,
             " has ", end - begin);
    }
    longest = std::max(longest, end - begin);
  }
  return longest;
}

void check_used(const char* name, const int32_t* used, const int32_t* cu_seqlens, int64_t batch, int64_t seqlen) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cu_seqlens != nullptr ? cu_seqlens[b + 1] - cu_seqlens[b] : seqlen;
    if (used[b] < 0 || used[b] > length) {
      refuse(name, " must lie in [0, length of its sequence], but entry ", b, " is ", used[b], " of ", length);
    }
  }
}

void fill_lengths(const Arguments& a, ForwardParams& p, bool read_lengths) {
  const auto vector = [&](const char* name, const std::optional<TensorInfo>& tensor, int64_t size,
                          const char* meaning) -> const int32_t* {
    if (!tensor) return nullptr;
    check_vector(name, *tensor, DType::kInt32, size, meaning, a.q);
    return static_cast<const int32_t*>(tensor->data);
  };
  p.cu_seqlens_q = vector("cu_seqlens_q", a.cu_seqlens_q, p.batch + 1, "batch + 1");
  p.cu_seqlens_k = vector("cu_seqlens_k", a.cu_seqlens_k, p.batch + 1, "batch + 1");
  p.seqused_q = vector("seqused_q", a.seqused_q, p.batch, "batch");
  p.seqused_k = vector("seqused_k", a.seqused_k, p.batch, "batch");
  if (p.device != DeviceType::kCPU || !read_lengths) return;
  if (p.is_varlen_q()) p.seqlen_q = check_lengths("q", p.cu_seqlens_q, p.batch, p.total_q, a.max_seqlen_q);
  if (p.is_varlen_k()) p.seqlen_k = check_lengths("k", p.cu_seqlens_k, p.batch, p.total_k, a.max_seqlen_k);
  if (p.seqused_q != nullptr) check_used("seqused_q", p.seqused_q, p.cu_seqlens_q, p.batch, p.seqlen_q);
  if (p.seqused_k != nullptr) check_used("seqused_k", p.seqused_k, p.cu_seqlens_k, p.batch, p.seqlen_k);
}

void fill_mask(const Arguments& a, ForwardParams& p) {
  if (!a.attn_mask) return;
  const TensorInfo& mask = *a.attn_mask;
  if (mask.dtype != DType::kBool && mask.dtype != p.dtype && mask.dtype != DType::kFloat32) {
    refuse("attn_mask must be bool, float32 or q's dtype (", dtype_name(p.dtype), "), but is ", dtype_name(mask.dtype));
  }
  const int64_t full[4] = {p.batch, p.num_heads, p.is_varlen_q() ? a.max_seqlen_q : p.seqlen_q,
                           p.is_varlen_k() ? a.max_seqlen_k : p.seqlen_k};
  bool fits = mask.ndim == 4;
  for (int i = 0; fits && i < 4; ++i) fits = mask.size[i] == full[i] || mask.size[i] == 1;
  if (!fits) {
    refuse("attn_mask must broadcast to (batch, num_heads, seqlen_q, seqlen_k) = (", full[0], ", ", full[1], ", ",
           full[2], ", ", full[3], "), but has shape ", shape_string(mask));
  }
  check_device("attn_mask", mask, a.q);
  p.mask = mask_view(mask);
  if (!a.packed_mask) {
    // One that was expanded is as small as what it was expanded from; but see keep_shape_of_mask().
    int64_t* const sizes[4] = {&p.mask.batch_size, &p.mask.head_size, &p.mask.row_size, &p.mask.col_size};
    for (int i = 0; i < 4; ++i) {
      if (mask.stride[i] == 0) *sizes[i] = 1;
    }
  }
}

void fill_packed_mask(const Arguments& a, ForwardParams& p) {
  if (!a.packed_mask) return;
  if (!a.attn_mask) refuse("attn_mask must be given with packed_mask, but is None");
  check_vector("packed_mask", *a.packed_mask, DType::kInt64, mask::stored_bytes(p.mask) / 8,
               "words that pack_mask makes of attn_mask", a.q);
  p.mask.packed = a.packed_mask->data;
}

void fill_slopes_and_sinks(const Arguments& a, ForwardParams& p) {
  const DType statistics = statistics_dtype(p.dtype);
  if (a.alibi_slopes) {
    const TensorInfo& slopes = *a.alibi_slopes;
    if (slopes.dtype != statistics) {
      refuse("alibi_slopes must be ", dtype_name(statistics), ", but is ", dtype_name(slopes.dtype));
    }
    const bool one = slopes.ndim == 1 && slopes.size[0] == p.num_heads;
    const bool two = slopes.ndim == 2 && slopes.size[0] == p.batch && slopes.size[1] == p.num_heads;
    if (!one && !two) {
      refuse("alibi_slopes must have shape (num_heads) = (", p.num_heads, ",) or (batch, num_heads) = (", p.batch, ", ",
             p.num_heads, "), but has ", shape_string(slopes));
    }
    check_device("alibi_slopes", slopes, a.q);
    p.alibi_slopes = slopes.data;
    p.alibi_batch_stride = two ? slopes.stride[0] : 0;
    p.alibi_head_stride = slopes.stride[slopes.ndim - 1];
  }
  if (a.sinks) {
    check_vector("sinks", *a.sinks, statistics, p.num_heads, "num_heads", a.q);
    p.sinks = a.sinks->data;
  }
}

void fill_options(const Arguments& a, ForwardParams& p) {
  p.softmax_scale = a.softmax_scale.value_or(p.head_dim > 0 ? 1.0 / std::sqrt(double(p.head_dim)) : 1.0);
  if (!(a.softcap >= 0.0) || std::isinf(a.softcap)) {
    refuse("softcap must be 0 (off) or a positive number, but is ", a.softcap);
  }
  p.softcap = a.softcap;
  if (a.causal < 0 || a.causal > 2) {
    refuse("causal must be 0 (none), 1 (top-left) or 2 (bottom-right), but is ", a.causal);
  }
  p.causal = Causal(a.causal);
  if (a.window_left < -1 || a.window_right < -1) {
    refuse("window must be two numbers >= 0, or -1 for no limit, but is (", a.window_left, ", ", a.window_right, ")");
  }
  // No |row + diagonal - column| exceeds seqlen_q + seqlen_k: a wider window is none.
  const int64_t widest = p.seqlen_q + p.seqlen_k;
  p.window_left = a.window_left > widest ? -1 : a.window_left;
  p.window_right = p.causal != Causal::kNone ? 0 : a.window_right > widest ? -1 : a.window_right;
  if (!(a.dropout_p >= 0.0 && a.dropout_p <= 1.0)) refuse("dropout_p must be in [0, 1], but is ", a.dropout_p);
  p.dropout_p = a.dropout_p;
  if (p.dropout_p > 0.0) {
    if (!a.rng_state) refuse("rng_state must be given when dropout_p > 0, but is None");
    check_vector("rng_state", *a.rng_state, DType::kInt64, 2, "seed, offset", a.q);
    p.rng_state = static_cast<const int64_t*>(a.rng_state->data);
  }
  p.deterministic = a.deterministic;
}

void check_like(const char* name, const TensorInfo& tensor, const TensorInfo& expected) {
  bool same = tensor.ndim == expected.ndim && tensor.dtype == expected.dtype && tensor.device == expected.device &&
              tensor.device_index == expected.device_index;
  for (int i = 0; same && i < tensor.ndim; ++i) same = tensor.size[i] == expected.size[i];
  if (!same) {
    refuse(name, " must have shape ", shape_string(expected), ", dtype ", dtype_name(expected.dtype),
           " and q's device, but has ", shape_string(tensor), " and dtype ", dtype_name(tensor.dtype));
  }
}

TensorInfo expected_out(const TensorInfo& q, int64_t head_dim_v) {
  TensorInfo out = q;
  out.size[q.ndim - 1] = head_dim_v;
  return out;
}

TensorInfo expected_lse(const TensorInfo& q, const ForwardParams& p) {
  TensorInfo lse = q;
  lse.dtype = statistics_dtype(p.dtype);
  lse.ndim = p.is_varlen_q() ? 2 : 3;
  lse.size[0] = p.is_varlen_q() ? p.num_heads : p.batch;
  lse.size[1] = p.is_varlen_q() ? p.total_q : p.num_heads;
  lse.size[2] = p.seqlen_q;
  return lse;
}

void check_needs(const Arguments& a, const std::vector<bool>& needs) {
  if (needs.size() != Arguments::kDifferentiable) {
    refuse("needs must have 6 entries (q, k, v, attn_mask, alibi_slopes, sinks), but has ", needs.size());
  }
  if (needs[3] && (!a.attn_mask || a.attn_mask->dtype == DType::kBool)) {
    refuse("attn_mask must be a floating-point tensor to have a gradient");
  }
  if (needs[4] && !a.alibi_slopes) refuse("alibi_slopes must be given to have a gradient, but is None");
  if (needs[5] && !a.sinks) refuse("sinks must be given to have a gradient, but is None");
}

}  // namespace

ForwardParams make_forward_params(const Arguments& a, bool read_lengths) {
  const bool packed_q = a.cu_seqlens_q.has_value(), packed_k = a.cu_seqlens_k.has_value();
  check_rank("q", a.q, packed_q, a.heads_first);
  check_rank("k", a.k, packed_k, a.heads_first);
  check_rank("v", a.v, packed_k, a.heads_first);
  const Shape q = shape_of(a.q, packed_q, a.heads_first), k = shape_of(a.k, packed_k, a.heads_first),
              v = shape_of(a.v, packed_k, a.heads_first);
  check_qkv(a, q, k, v);

  ForwardParams p;
  p.dtype = a.q.dtype;
  p.device = a.q.device;
  p.device_index = a.q.device_index;
  p.q = tensor_view(a.q, a.heads_first);
  p.k = tensor_view(a.k, a.heads_first);
  p.v = tensor_view(a.v, a.heads_first);
  if (packed_q) {
    if (a.cu_seqlens_q->ndim != 1 || a.cu_seqlens_q->size[0] < 1) {
      refuse("cu_seqlens_q must have shape (batch + 1), but has ", shape_string(*a.cu_seqlens_q));
    }
    if (a.max_seqlen_q < 0) refuse("max_seqlen_q must be >= 0, but is ", a.max_seqlen_q);
  }
  if (packed_k && a.max_seqlen_k < 0) refuse("max_seqlen_k must be >= 0, but is ", a.max_seqlen_k);
  p.batch = packed_q ? a.cu_seqlens_q->size[0] - 1 : q.batch;
  if (!packed_k && k.batch != p.batch) {
    refuse("q and k must have the same batch, but q has ", p.batch, " and k ", k.batch);
  }
  p.num_heads = q.heads;
  p.num_heads_k = k.heads;
  // max_seqlen is a bound, and may be a careless one: no sequence is longer than all together.
  p.seqlen_q = packed_q ? std::min(a.max_seqlen_q, q.rows) : q.rows;
  p.seqlen_k = packed_k ? std::min(a.max_seqlen_k, k.rows) : k.rows;
  if (packed_q && packed_k && a.cu_seqlens_q->data == a.cu_seqlens_k->data) {  // one bound holds for both
    p.seqlen_q = p.seqlen_k = std::min(p.seqlen_q, p.seqlen_k);
  }
  p.total_q = packed_q ? q.rows : p.batch * q.rows;
  p.total_k = packed_k ? k.rows : p.batch * k.rows;
  p.head_dim = q.columns;
  p.head_dim_v = v.columns;
  fill_lengths(a, p, read_lengths);
  fill_mask(a, p);
  fill_packed_mask(a, p);
  fill_options(a, p);
  fill_slopes_and_sinks(a, p);
  return p;
}

void keep_shape_of_mask(const Arguments& a, ForwardParams& p) {
  void* const packed = p.mask.packed;
  p.mask = mask_view(*a.attn_mask);
  p.mask.packed = packed;
}

MaskView mask_view(const TensorInfo& mask) {
  const auto stride = [&](int i) { return mask.size[i] == 1 ? 0 : mask.stride[i]; };
  MaskView view;
  view.data = mask.data, view.dtype = mask.dtype;
  view.batch = stride(0), view.head = stride(1), view.row = stride(2), view.col = stride(3);
  view.batch_size = mask.size[0], view.head_size = mask.size[1];
  view.row_size = mask.size[2], view.col_size = mask.size[3];
  return view;
}

bool fit_as_they_are(const Arguments& a, bool shared_heads) {
  if (a.q.ndim != 4 || a.k.ndim != 4 || a.v.ndim != 4) return false;
  const int head = a.heads_first ? 1 : 2;
  const int64_t heads = a.q.size[head], heads_k = a.k.size[head];
  if (a.k.size[0] != a.q.size[0] || a.v.size[0] != a.k.size[0] || a.v.size[head] != heads_k) return false;
  return heads_k == heads || heads_k == 1 || (shared_heads && heads_k > 0 && heads % heads_k == 0);
}

void check_saved(const Arguments& arguments, const ForwardParams& params, const Saved& saved) {
  const TensorInfo out = expected_out(arguments.q, params.head_dim_v), lse = expected_lse(arguments.q, params);
  check_like("dout", saved.dout, out);
  check_like("out", saved.out, out);
  check_like("lse", saved.lse, lse);
  if (saved.dlse) check_like("dlse", *saved.dlse, lse);
  check_needs(arguments, saved.needs);
}

}  // namespace flash_attn
