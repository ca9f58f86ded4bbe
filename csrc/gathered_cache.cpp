#include "gathered_cache.h"

#include <algorithm>

#include "select_kernel.h"

namespace flash_attn {

namespace {

constexpr int64_t kFewRows = 64;  // packed: one tile of the kernels for few query rows
constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

/// Query rows of a sequence, in the mean where their numbers lie on the device.
int64_t query_rows(const ForwardParams& p) {
  return p.is_varlen_q() ? std::max<int64_t>(1, p.total_q / p.batch) : p.seqlen_q;
}

/// Of a sequence's keys, of which all count as used.
struct Keys {
  double seen;  // by a query row
  double copied;
};

Keys keys_of(const ForwardParams& p) {
  const double all = double(p.seqlen_k), rows = double(query_rows(p));
  Keys keys{all, all};
  if (p.window_left >= 0) {
    keys.copied = std::min(all, double(p.window_left) + rows + double(KeyGather::kWidestBlock));
    keys.seen = std::min(all, double(p.window_left) + 1 + std::max(0.0, double(p.window_right)));
  } else if (p.window_right >= 0) {
    keys.seen = all - std::min(all, rows) / 2;
  }
  return keys;
}

/// Whether copies and attention to them take less time than the kernels for few query rows, which read the keys of a
/// head again for every 64 packed rows. The unit is what those take for a packed row and a key
/// (benchmarks/experiments/119); it grows with the head dimension as a copy does.
bool pays(const ForwardParams& p) {
  constexpr double kOrdinary = 0.55;  // of a row and a key
  constexpr double kCopy = 190;       // of a key
  constexpr int64_t kTile = 128, kPackedTile = 64;
  constexpr int64_t kMaxHeadDim = 256;  // of those kernels, but for values that are a part of the keys
  if (std::max(p.head_dim, p.head_dim_v) > kMaxHeadDim) return false;
  const auto whole = [](int64_t rows, int64_t tile) { return double(ceil_div(rows, tile) * tile); };
  const Keys keys = keys_of(p);
  const int64_t rows = query_rows(p);
  const double few_rows_kernels = whole(rows * p.group_size(), kPackedTile) * keys.seen;
  const double ordinary = whole(rows, kTile) * double(p.group_size()) * keys.seen * kOrdinary;
  return ordinary + kCopy * keys.copied < few_rows_kernels;
}

/// Where all sequences have rows for themselves, so that copies are no larger than the cache of this layer.
bool is_small(const ForwardParams& p) {
  const CacheView& cache = p.cache;
  const double rows = double(cache.entries) * double(cache.block_table != nullptr ? cache.page_size : p.seqlen_k);
  return double(p.batch) * double(p.seqlen_k) <= rows;
}

}  // namespace

GatheredCache::GatheredCache(const ForwardParams& over_cache) : params(over_cache) {
  gather.problem = over_cache;
  const auto rows = [&](TensorView& view, int64_t columns) {
    view.head = columns;
    view.row = over_cache.num_heads_k * columns;
    view.batch = over_cache.seqlen_k * view.row;
    return aligned(over_cache.batch * view.batch * size_of(over_cache.dtype));
  };
  bytes = rows(params.k, over_cache.head_dim) + rows(params.v, over_cache.head_dim_v) +
          aligned(over_cache.batch * size_of(DType::kInt32));
  params.cache = CacheView{};
  place(nullptr);
}

void GatheredCache::place(void* memory) {
  const CacheView& cache = gather.problem.cache;
  char* next = static_cast<char*>(memory);
  const auto take = [&](int64_t size) {
    char* const taken = next;
    next += aligned(size);
    return taken;
  };
  params.k.data = take(params.batch * params.k.batch * size_of(params.dtype));
  params.v.data = take(params.batch * params.v.batch * size_of(params.dtype));
  gather.k = params.k;
  gather.v = params.v;
  if (cache.first == nullptr && cache.appended == 0) return;  // lengths are those that were given
  gather.lengths = reinterpret_cast<int32_t*>(take(params.batch * size_of(DType::kInt32)));
  params.seqused_k = gather.lengths;
}

bool gathers_cache(const ForwardParams& p, const std::vector<const ForwardKernel*>& kernels, const DeviceInfo& device) {
  if (!p.cache.exists() || backend_of(p.device).gather_keys == nullptr) return false;
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return false;
  if (p.batch == 0 || p.seqlen_k == 0) return false;
  const bool few = query_rows(p) * p.group_size() <= kFewRows;
  if (few && forced_family() == nullptr) return false;
  const ForwardKernel* const there = find_kernel(kernels, p, device);
  const ForwardKernel* const on_copies = find_kernel(kernels, GatheredCache(p).params, device);
  if (on_copies == nullptr || on_copies == there) return false;
  if (there == nullptr) return true;  // of what FLASH_ATTN_FORCE allows
  const ForwardKernel* const any = kernels.back();
  if (few || on_copies == any || !is_small(p)) return false;
  return there == any || pays(p);
}

}  // namespace flash_attn
