// The arguments of the ops on a cache of keys and values, as arguments.h has those of attention: listed once, and
// checked on the host before anything is allocated or launched.
#pragma once

#include <optional>

#include "../../float8.h"
#include "../../host_device.h"
#include "../../row_copies.h"
#include "../tensor_info.h"

namespace flash_attn {

/// The arguments of flash_attn::attend_cache; flash_attn/torch_op/cache.py has its twin.
struct CacheArguments {
  TensorInfo q;        // (batch, seqlen_q, num_heads, head_dim), with cu_seqlens_q (total_q, num_heads, head_dim)
  TensorInfo k_cache;  // (entries, seqlen, num_heads_k, head_dim), with block_table (pages, page_size, ...)
  TensorInfo v_cache;  // as k_cache, with head_dim_v
  std::optional<TensorInfo> alibi_slopes, sinks;   // as of attention
  std::optional<TensorInfo> cu_seqlens_q;          // (batch + 1)
  std::optional<TensorInfo> cache_seqlens;         // (batch): rows that are filled; without: all
  std::optional<TensorInfo> cache_batch_idx;       // (batch): the sequence's entry
  std::optional<TensorInfo> cache_leftpad;         // (batch): rows before it take no part
  std::optional<TensorInfo> block_table;           // (batch, blocks): the sequence's pages
  std::optional<TensorInfo> k_descale, v_descale;  // of float8 caches: (batch, num_heads_k) or (num_heads_k), float32
  int64_t max_seqlen_q = 0;                        // with cu_seqlens_q
  int64_t appended = 0;                            // rows that cache_seqlens does not count
  std::optional<double> softmax_scale;
  int64_t causal = 0;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0.0;

  template <typename Visit>
  constexpr void for_each_tensor(const Visit& visit) {
    visit("q", q);
    visit("k_cache", k_cache);
    visit("v_cache", v_cache);
    visit("alibi_slopes", alibi_slopes);
    visit("sinks", sinks);
    visit("cu_seqlens_q", cu_seqlens_q);
    visit("cache_seqlens", cache_seqlens);
    visit("cache_batch_idx", cache_batch_idx);
    visit("cache_leftpad", cache_leftpad);
    visit("block_table", block_table);
    visit("k_descale", k_descale);
    visit("v_descale", v_descale);
  }

  template <typename Visit>
  constexpr void for_each_option(const Visit& visit) {
    visit("max_seqlen_q", "SymInt", max_seqlen_q);
    visit("appended", "SymInt", appended);
    visit("softmax_scale", "float?", softmax_scale);
    visit("causal", "int", causal);
    visit("window_left", "SymInt", window_left);
    visit("window_right", "SymInt", window_right);
    visit("softcap", "float", softcap);
  }
};

/// Checks everything and fills all but out, lse and workspace. Lengths, entries and pages are checked too where they
/// are in host memory and `read_values` is true.
FLASH_ATTN_EXPORT ForwardParams make_cache_params(const CacheArguments& arguments, bool read_values = true);

inline bool is_float8(const TensorInfo& cache) { return cache.dtype == kFloat8E4M3; }

/// The same where is_float8(k_cache), `params` made by make_cache_params.
FLASH_ATTN_EXPORT Float8Params make_float8_params(const CacheArguments& arguments, const ForwardParams& params);

/// The arguments of flash_attn::append_and_attend, which first writes k and v behind the rows of each sequence.
struct AppendArguments {
  TensorInfo k_cache, v_cache, q;                    // as of CacheArguments
  TensorInfo k, v;                                   // (batch, seqlen_new, num_heads_k, head_dim and head_dim_v)
  std::optional<TensorInfo> rotary_cos, rotary_sin;  // (positions, rotary_dim / 2): turn q and k
  std::optional<TensorInfo> alibi_slopes, sinks;
  TensorInfo cache_seqlens;                 // (batch): rows that are filled before
  std::optional<TensorInfo> total_seqlens;  // (batch): and after, for kernels that do not count seqlen_new
  std::optional<TensorInfo> cache_batch_idx, cache_leftpad, block_table, k_descale, v_descale;
  std::optional<double> softmax_scale;
  int64_t causal = 0;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0.0;
  bool rotary_interleaved = false;

  template <typename Visit>
  constexpr void for_each_tensor(const Visit& visit) {
    visit("k_cache", k_cache);
    visit("v_cache", v_cache);
    visit("q", q);
    visit("k", k);
    visit("v", v);
    visit("rotary_cos", rotary_cos);
    visit("rotary_sin", rotary_sin);
    visit("alibi_slopes", alibi_slopes);
    visit("sinks", sinks);
    visit("cache_seqlens", cache_seqlens);
    visit("total_seqlens", total_seqlens);
    visit("cache_batch_idx", cache_batch_idx);
    visit("cache_leftpad", cache_leftpad);
    visit("block_table", block_table);
    visit("k_descale", k_descale);
    visit("v_descale", v_descale);
  }

  template <typename Visit>
  constexpr void for_each_option(const Visit& visit) {
    visit("softmax_scale", "float?", softmax_scale);
    visit("causal", "int", causal);
    visit("window_left", "SymInt", window_left);
    visit("window_right", "SymInt", window_right);
    visit("softcap", "float", softcap);
    visit("rotary_interleaved", "bool", rotary_interleaved);
  }

  /// Those of the attention that follows.
  FLASH_ATTN_EXPORT CacheArguments attention() const;
};

/// The checks of k, v and the tables, and how they are written.
FLASH_ATTN_EXPORT RowCopies make_append_params(const AppendArguments& arguments, bool read_values = true);

/// q turned to the rows behind the cache; nothing turns without tables. Where q goes is not filled.
RowCopies make_turned_query_params(const AppendArguments& arguments);

}  // namespace flash_attn
