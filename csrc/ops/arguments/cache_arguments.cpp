#include "cache_arguments.h"

#include <string>

#include "arguments.h"
#include "checks.h"
#include "refuse.h"
#include "rotary_arguments.h"

namespace flash_attn {

namespace {

constexpr int64_t kMaxRows = int64_t{1} << 31;  // lengths and page numbers are int32

struct Cache {
  CacheView view;
  int64_t capacity;  // rows of a sequence
};

void check_cache_tensor(const char* name, const TensorInfo& tensor, bool paged) {
  if (tensor.ndim != 4) {
    refuse(name, " must be ", paged ? "(pages, page_size, heads, head_dim)" : "(entries, seqlen, heads, head_dim)",
           ", but has shape ", shape_string(tensor));
  }
  if (tensor.size[3] > 1 && tensor.stride[3] != 1) {
    refuse(name, " must have a last stride of 1, but has ", tensor.stride[3]);
  }
}

const int32_t* int_vector(const char* name, const std::optional<TensorInfo>& tensor, int64_t batch,
                          const TensorInfo& like) {
  if (!tensor) return nullptr;
  check_vector(name, *tensor, DType::kInt32, batch, "batch", like);
  if (batch > 1 && tensor->stride[0] != 1) refuse(name, " must be contiguous, but has stride ", tensor->stride[0]);
  return static_cast<const int32_t*>(tensor->data);
}

void check_block_table(const TensorInfo& table, int64_t batch, const TensorInfo& like) {
  if (table.dtype != DType::kInt32) refuse("block_table must be int32, but is ", dtype_name(table.dtype));
  if (table.ndim != 2 || table.size[0] != batch) {
    refuse("block_table must have shape (batch, blocks) with batch ", batch, ", but has ", shape_string(table));
  }
  if (table.size[1] > 1 && table.stride[1] != 1) {
    refuse("block_table must have a last stride of 1, but has ", table.stride[1]);
  }
  check_device("block_table", table, like);
}

/// What attention and append have in common. `like` is a tensor on the device that all have to be on.
Cache cache_of(const TensorInfo& k, const TensorInfo& v, const std::optional<TensorInfo>& batch_idx,
               const std::optional<TensorInfo>& block_table, int64_t batch, const TensorInfo& like) {
  const bool paged = block_table.has_value();
  check_cache_tensor("k_cache", k, paged);
  check_cache_tensor("v_cache", v, paged);
  for (int i = 0; i < 3; ++i) {
    if (k.size[i] != v.size[i]) {
      refuse("k_cache and v_cache must have the same ", paged ? "pages, page_size" : "entries, seqlen",
             " and heads, but have shapes ", shape_string(k), " and ", shape_string(v));
    }
  }
  Cache cache{};
  cache.view.entries = k.size[0];
  cache.capacity = k.size[1];
  if (paged) {
    if (batch_idx)
      refuse("cache_batch_idx must be None with block_table, which says where a sequence lies, but is given");
    check_block_table(*block_table, batch, like);
    cache.view.block_table = static_cast<const int32_t*>(block_table->data);
    cache.view.table_stride = block_table->stride[0];
    cache.view.page_size = k.size[1];
    cache.capacity = block_table->size[1] * k.size[1];
    if (k.size[1] == 0 && batch > 0) refuse("pages must have rows, but k_cache has shape ", shape_string(k));
  } else {
    cache.view.batch_index = int_vector("cache_batch_idx", batch_idx, batch, like);
    if (!batch_idx && k.size[0] < batch) {
      refuse("k_cache must have an entry for each sequence, or cache_batch_idx be given, but it has ", k.size[0],
             " and the batch is ", batch);
    }
  }
  if (k.size[0] == 0 && batch > 0) refuse("k_cache must have entries, but has shape ", shape_string(k));
  if (cache.capacity >= kMaxRows || k.size[0] >= kMaxRows) {
    refuse("k_cache must have under 2^31 rows a sequence and as many entries, but has shape ", shape_string(k));
  }
  return cache;
}

void check_range(const char* name, const int32_t* values, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; values != nullptr && i < count; ++i) {
    if (values[i] < low || values[i] > high) {
      refuse(name, " must lie in [", low, ", ", high, "], but entry ", i, " is ", values[i]);
    }
  }
}

/// Entries and pages in host memory: of each sequence those that hold its first lengths[b] + appended rows.
void check_values(const Cache& cache, const int32_t* lengths, int64_t appended, int64_t batch) {
  check_range("cache_batch_idx", cache.view.batch_index, batch, 0, cache.view.entries - 1);
  if (lengths != nullptr) {
    for (int64_t b = 0; b < batch; ++b) {
      if (lengths[b] < 0 || lengths[b] + appended > cache.capacity) {
        refuse("the cache must have room for cache_seqlens and the rows that are appended, but it has ", cache.capacity,
               " rows, and sequence ", b, " has ", lengths[b], " and ", appended);
      }
    }
  }
  for (int64_t b = 0; cache.view.block_table != nullptr && b < batch; ++b) {
    const int64_t rows = lengths != nullptr ? lengths[b] + appended : cache.capacity;
    check_range(("block_table[" + std::to_string(b) + "]").c_str(),
                cache.view.block_table + b * cache.view.table_stride, ceil_div(rows, cache.view.page_size), 0,
                cache.view.entries - 1);
  }
}

bool in_host_memory(const TensorInfo& tensor) {
  return tensor.device == DeviceType::kCPU && tensor.device_index != TensorInfo::kMeta;
}

void check_descale(const char* name, const std::optional<TensorInfo>& descale, const TensorInfo& cache, int64_t batch,
                   const TensorInfo& like) {
  if (!descale) return;
  if (!is_float8(cache)) {
    refuse(name, " must be None with caches that are not float8_e4m3fn, but is given, and they are ",
           dtype_name(cache.dtype));
  }
  if (descale->dtype != DType::kFloat32) refuse(name, " must be float32, but is ", dtype_name(descale->dtype));
  const int64_t heads = cache.size[2];
  const bool each = descale->ndim == 2;
  if ((!each && descale->ndim != 1) || descale->size[descale->ndim - 1] != heads ||
      (each && descale->size[0] != batch)) {
    refuse(name, " must have shape (batch, heads) = (", batch, ", ", heads, ") or (heads), but has ",
           shape_string(*descale));
  }
  check_device(name, *descale, like);
}

/// Also that there are kernels for float8 caches where they are.
void check_descales(const TensorInfo& cache, const std::optional<TensorInfo>& k_descale,
                    const std::optional<TensorInfo>& v_descale, int64_t batch, const TensorInfo& like) {
  check_descale("k_descale", k_descale, cache, batch, like);
  check_descale("v_descale", v_descale, cache, batch, like);
  if (is_float8(cache) && in_host_memory(like)) {
    refuse("caches of float8_e4m3fn must be on a GPU of compute capability 8.9 or later, but k_cache is on cpu");
  }
}

Descale descale_of(const std::optional<TensorInfo>& descale) {
  if (!descale) return {};
  const int last = descale->ndim - 1;
  return {static_cast<const float*>(descale->data), last > 0 ? descale->stride[0] : 0, descale->stride[last]};
}

/// k_cache and v_cache have q's dtype, or are float8_e4m3fn both.
void check_cache_dtypes(DType dtype, const TensorInfo& k, const TensorInfo& v) {
  if (is_float8(k) && is_float8(v)) {
    if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
      refuse("q must be bfloat16 or float16 with caches of float8_e4m3fn, but is ", dtype_name(dtype));
    }
    return;
  }
  for (const auto& [name, cache] : {std::pair{"k_cache", &k}, std::pair{"v_cache", &v}}) {
    if (cache->dtype != dtype) {
      refuse(name, " must have q's dtype ", dtype_name(dtype), is_float8(*cache) ? " or both be float8_e4m3fn" : "",
             ", but is ", dtype_name(cache->dtype));
    }
  }
}

/// What attention would refuse under names of its own.
void check_queries(const CacheArguments& a) {
  const int rank = a.cu_seqlens_q ? 3 : 4;
  if (a.q.ndim != rank) {
    refuse("q must be ",
           rank == 3 ? "(total_q, heads, head_dim) with cu_seqlens_q" : "(batch, seqlen, heads, head_dim)",
           ", but has shape ", shape_string(a.q));
  }
  check_dtype("q", a.q.dtype);
  check_cache_dtypes(a.q.dtype, a.k_cache, a.v_cache);
  check_device("k_cache", a.k_cache, a.q);
  check_device("v_cache", a.v_cache, a.q);
  if (a.q.size[rank - 1] != a.k_cache.size[3]) {
    refuse("q and k_cache must have the same head_dim, but have shapes ", shape_string(a.q), " and ",
           shape_string(a.k_cache));
  }
  const int64_t heads = a.q.size[rank - 2], heads_k = a.k_cache.size[2];
  if (heads_k == 0 ? heads != 0 : heads % heads_k != 0) {
    refuse("the heads of k_cache and v_cache must divide those of q, but q has ", heads, " and k_cache ", heads_k);
  }
}

/// k_cache or v_cache as if each sequence had its rows in a tensor of its own: with the shapes and the dtype that
/// attention checks.
TensorInfo as_sequences(TensorInfo tensor, DType dtype, int64_t batch, int64_t capacity) {
  tensor.dtype = dtype;
  tensor.size[0] = batch;
  tensor.size[1] = capacity;
  return tensor;
}

}  // namespace

ForwardParams make_cache_params(const CacheArguments& a, bool read_values) {
  if (a.cu_seqlens_q && (a.cu_seqlens_q->ndim != 1 || a.cu_seqlens_q->size[0] < 1)) {
    refuse("cu_seqlens_q must have shape (batch + 1), but has ", shape_string(*a.cu_seqlens_q));
  }
  if (a.q.ndim == 0) refuse("q must have dimensions, but has shape ", shape_string(a.q));
  const int64_t batch = a.cu_seqlens_q ? a.cu_seqlens_q->size[0] - 1 : a.q.size[0];
  const Cache cache = cache_of(a.k_cache, a.v_cache, a.cache_batch_idx, a.block_table, batch, a.q);
  check_queries(a);
  check_descales(a.k_cache, a.k_descale, a.v_descale, batch, a.q);
  Arguments attention;
  attention.q = a.q;
  attention.k = as_sequences(a.k_cache, a.q.dtype, batch, cache.capacity);
  attention.v = as_sequences(a.v_cache, a.q.dtype, batch, cache.capacity);
  attention.alibi_slopes = a.alibi_slopes;
  attention.sinks = a.sinks;
  attention.cu_seqlens_q = a.cu_seqlens_q;
  attention.max_seqlen_q = a.max_seqlen_q;
  attention.softmax_scale = a.softmax_scale;
  attention.causal = a.causal;
  attention.window_left = a.window_left;
  attention.window_right = a.window_right;
  attention.softcap = a.softcap;
  ForwardParams p = make_forward_params(attention, read_values);
  if (a.appended < 0) refuse("appended must be >= 0, but is ", a.appended);
  p.seqused_k = int_vector("cache_seqlens", a.cache_seqlens, batch, a.q);
  const bool ordinary =
      !a.cache_batch_idx && !a.cache_leftpad && !a.block_table && a.appended == 0 && !is_float8(a.k_cache);
  if (!ordinary) p.cache = cache.view;
  const int32_t* const first = int_vector("cache_leftpad", a.cache_leftpad, batch, a.q);
  p.cache.first = first;
  p.cache.appended = a.appended;
  if (read_values && in_host_memory(a.q)) {
    check_values(cache, p.seqused_k, a.appended, batch);
    for (int64_t b = 0; first != nullptr && b < batch; ++b) {
      const int64_t filled = p.seqused_k != nullptr ? p.seqused_k[b] + a.appended : cache.capacity;
      check_range("cache_leftpad", first + b, 1, 0, filled);
    }
  }
  return p;
}

Float8Params make_float8_params(const CacheArguments& a, const ForwardParams& params) {
  return {params, descale_of(a.k_descale), descale_of(a.v_descale)};
}

CacheArguments AppendArguments::attention() const {
  CacheArguments a;
  a.q = q;
  a.k_cache = k_cache;
  a.v_cache = v_cache;
  a.alibi_slopes = alibi_slopes;
  a.sinks = sinks;
  a.cache_seqlens = total_seqlens ? *total_seqlens : cache_seqlens;
  a.appended = total_seqlens ? 0 : k.size[1];
  a.cache_batch_idx = cache_batch_idx;
  a.cache_leftpad = cache_leftpad;
  a.block_table = block_table;
  a.k_descale = k_descale;
  a.v_descale = v_descale;
  a.softmax_scale = softmax_scale;
  a.causal = causal;
  a.window_left = window_left;
  a.window_right = window_right;
  a.softcap = softcap;
  return a;
}

RowCopies make_append_params(const AppendArguments& a, bool read_values) {
  if (!is_float8(a.k_cache)) check_dtype("k_cache", a.k_cache.dtype);
  if (a.q.ndim != 4) refuse("q must be (batch, seqlen, heads, head_dim), but has shape ", shape_string(a.q));
  for (const auto& [name, tensor] : {std::pair{"k", &a.k}, std::pair{"v", &a.v}, std::pair{"v_cache", &a.v_cache}}) {
    const bool stored = tensor == &a.v_cache;  // new rows of a float8 cache are given as q is
    const DType dtype = is_float8(a.k_cache) && !stored ? a.q.dtype : a.k_cache.dtype;
    if (tensor->dtype != dtype) {
      refuse(name, " must have ", dtype == a.k_cache.dtype ? "k_cache" : "q", "'s dtype ", dtype_name(dtype),
             ", but is ", dtype_name(tensor->dtype));
    }
    if (tensor->ndim != 4) refuse(name, " must have 4 dimensions, but has shape ", shape_string(*tensor));
    check_device(name, *tensor, a.k_cache, "k_cache");
  }
  const int64_t batch = a.q.size[0];
  const Cache cache = cache_of(a.k_cache, a.v_cache, a.cache_batch_idx, a.block_table, batch, a.k_cache);
  check_descales(a.k_cache, a.k_descale, a.v_descale, batch, a.k_cache);
  if (is_float8(a.k_cache)) check_cache_dtypes(a.q.dtype, a.k_cache, a.v_cache);
  const auto check_new = [&](const char* name, const TensorInfo& tensor, const TensorInfo& to) {
    if (tensor.size[0] != batch || tensor.size[1] != a.k.size[1] || tensor.size[2] != to.size[2] ||
        tensor.size[3] != to.size[3]) {
      refuse(name, " must be (batch, seqlen_new, heads, head_dim) = (", batch, ", ", a.k.size[1], ", ", to.size[2],
             ", ", to.size[3], ") like k and the cache, but has shape ", shape_string(tensor));
    }
  };
  check_new("k", a.k, a.k_cache);
  check_new("v", a.v, a.v_cache);
  check_written("k_cache", a.k_cache);
  check_written("v_cache", a.v_cache);

  RowCopies p;
  p.dtype = a.k.dtype;
  p.batch = batch;
  p.rows = a.k.size[1];
  p.offsets = int_vector("cache_seqlens", a.cache_seqlens, batch, a.k_cache);
  p.cache = cache.view;
  p.capacity = cache.capacity;
  p.to_float8 = is_float8(a.k_cache);
  p.descales[0] = descale_of(a.k_descale);
  p.descales[1] = descale_of(a.v_descale);
  if (p.rows > cache.capacity) {
    refuse("the cache must have room for the rows that are appended, but it has ", cache.capacity, " rows and k has ",
           p.rows);
  }
  p.count = 2;
  p.copies[0] = {tensor_view(a.k, false), tensor_view(a.k_cache, false), a.k.size[2], a.k.size[3], false};
  p.copies[1] = {tensor_view(a.v, false), tensor_view(a.v_cache, false), a.v.size[2], a.v.size[3], false};
  if (a.rotary_cos) {
    p.rotary = make_rotary(*a.rotary_cos, a.rotary_sin, a.rotary_interleaved, a.k);
    p.copies[0].turned = true;
    if (p.rotary.positions < cache.capacity) {
      refuse("rotary_cos must have a position for each row of the cache, ", cache.capacity, ", but has ",
             p.rotary.positions);
    }
  }
  if (read_values && in_host_memory(a.k_cache)) check_values(cache, p.offsets, p.rows, batch);
  return p;
}

RowCopies make_turned_query_params(const AppendArguments& a) {
  RowCopies p;
  if (!a.rotary_cos) return p;
  p.dtype = a.q.dtype;
  p.batch = a.q.size[0];
  p.rows = a.q.size[1];
  p.sequences = p.batch;
  p.offsets = static_cast<const int32_t*>(a.cache_seqlens.data);
  p.step = a.causal != 0 || a.window_left >= 0 || a.window_right >= 0 ? 1 : 0;
  p.rotary = make_rotary(*a.rotary_cos, a.rotary_sin, a.rotary_interleaved, a.q);
  p.count = 1;
  p.copies[0].from = tensor_view(a.q, false);
  p.copies[0].heads = a.q.size[2];
  p.copies[0].columns = a.q.size[3];
  p.copies[0].turned = p.rotary.exists();
  return p;
}

}  // namespace flash_attn
