// Backward pass: five products a tile, as in FlashAttention-2 (Dao 2023). A task owns a range of keys of one head of k:
// it goes over them in blocks, and for each block over the blocks of query rows, so that dk and dv grow in place while
// dq grows in memory of the task. Where there are few heads, keys are split among tasks, whose dq are then added up in
// order: the shape alone decides, so results do not depend on the number of threads. Query heads that share a head of k
// follow one after the other.
#pragma once

#include "../isa.h"
#include "../scores/lost_of_lse.h"
#include "../scores/row_statistics.h"
#include "mask_gradient.h"
#include "tile.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

constexpr int64_t kBackwardTasks = 32;        // as many as there should be at least ...
constexpr int64_t kMaxSplits = 8;             // ... but no more than this for a head, since each has a dq of its own
constexpr int64_t kMaxSplitBytes = 68 << 20;  // ... and all of these take no more than this: 4 of 65,536 x 64 floats
constexpr int64_t kQueryBytes = 16 << 20;     // for a head's queries, packed once by a task; where they need more, they
                                              // are packed anew for every block of keys

template <typename Arithmetic>
struct BackwardContext {
  using Acc = typename Arithmetic::Acc;
  const BackwardParams& params;
  RowStatistics<Acc> statistics;
  int64_t m_blocks, n_blocks;  // of the longest sequence
  int64_t splits;
  int64_t query_blocks;  // as many as a task keeps packed: m_blocks or 1
  int64_t ldm, ldd, ldv;
  bool wants_ds;
  // Sums of all tasks; null when a task keeps its own.
  Acc* dq = nullptr;                 // (batch, num_heads_k, splits, m_blocks, ldd, ldm)
  Acc *dk = nullptr, *dv = nullptr;  // (num_heads_k, key_blocks() * kBackwardBlockN, ldd or ldv)
  double* slopes = nullptr;          // (batch, num_heads, splits)
  int64_t group_head = 0;            // which of the query heads that share a head of k

  explicit BackwardContext(const BackwardParams& params) : params(params), statistics{nullptr, nullptr, nullptr} {
    const ForwardParams& p = params.forward;
    Arena none(nullptr);
    const BackwardScratch<Arithmetic> tile(p, 1, none);
    ldm = tile.ldm, ldd = tile.ldd, ldv = tile.ldv;
    m_blocks = (p.seqlen_q + ldm - 1) / ldm;
    const int64_t operands = tile.ldk + tile.lde + (ldd + ldv) / Arithmetic::kPack;
    query_blocks = m_blocks * ldm * operands * int64_t(sizeof(Acc)) <= kQueryBytes ? max(1, m_blocks) : 1;
    n_blocks = (p.seqlen_k + kBackwardBlockN - 1) / kBackwardBlockN;
    const int64_t heads = max(1, p.batch * p.num_heads_k);
    const int64_t affordable = kMaxSplitBytes / max(1, heads * m_blocks * ldd * ldm * int64_t(sizeof(Acc)));
    splits = max(1, min(min((kBackwardTasks + heads - 1) / heads, kMaxSplits), min(n_blocks, affordable)));
    wants_ds = params.dq.data != nullptr || params.dk.data != nullptr || params.dslopes != nullptr;
  }
  /// Of all sequences, each of which starts a new one. Packed ones: no sequence ends behind the start of the next.
  int64_t key_blocks() const {
    const ForwardParams& p = params.forward;
    return p.is_varlen_k() ? p.total_k / kBackwardBlockN + p.batch : p.batch * n_blocks;
  }
  int64_t first_key_block(const SequenceInfo& sequence, int64_t b) const {
    return params.forward.is_varlen_k() ? sequence.k_row / kBackwardBlockN + b : b * n_blocks;
  }
  int64_t dq_size() const { return params.dq.data != nullptr ? m_blocks * ldd * ldm : 0; }
  int64_t group_size() const { return params.forward.num_heads / params.forward.num_heads_k; }
  bool last_of_group() const { return group_head + 1 == group_size(); }
};

/// Task `index` is (sequence, head of k, split).
template <typename Arithmetic>
class KeyRange {
 public:
  using Acc = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  using Context = BackwardContext<Arithmetic>;
  static constexpr int kPack = Arithmetic::kPack;

  KeyRange(const Context& context, const SequenceInfo& sequence, int64_t index, void* scratch)
      : context_(context),
        index_(index),
        arena_(scratch),
        x_(context.params.forward, context.query_blocks, arena_),
        tiles_(context.params, context.statistics, sequence, b(), h(), x_),
        m_blocks_((sequence.seqlen_q_padded + x_.ldm - 1) / x_.ldm),
        n_blocks_((sequence.seqlen_k_padded + kBackwardBlockN - 1) / kBackwardBlockN) {
    own_dq_ = context.dq == nullptr ? arena_.template take<Acc>(context.dq_size()) : nullptr;
    own_dk_ = arena_.template take<Acc>(kBackwardBlockN * x_.ldd);
    own_dv_ = arena_.template take<Acc>(kBackwardBlockN * x_.ldv);
    packed_ = arena_.template take<uint8_t>(context.query_blocks);
  }
  int64_t scratch_bytes() const { return arena_.used(); }

  void run() {
    dq_ = context_.dq == nullptr ? own_dq_ : context_.dq + index_ * context_.dq_size();
    const bool wants_dq = context_.params.dq.data != nullptr;
    if (wants_dq) std::memset(dq_, 0, size_t(m_blocks_ * x_.ldd * x_.ldm) * sizeof(Acc));
    std::memset(packed_, 0, size_t(context_.query_blocks));
    const int64_t split = index_ % context_.splits;
    const int64_t end = n_blocks_ * (split + 1) / context_.splits;
    for (int64_t block = n_blocks_ * split / context_.splits; block < end; ++block) run_block(block);
    if (context_.slopes != nullptr) {
      context_.slopes[(b() * tiles_.p.num_heads + h()) * context_.splits + split] = dslope_;
    }
    if (context_.splits == 1 && wants_dq) {
      for (int64_t block = 0; block < m_blocks_; ++block) store_dq(tiles_, x_, block, dq_);
    }
  }

  /// Block `block` of dq, from the sums of a head, to the tensor; also the rows of the sequence that take no part.
  static void store_dq(const BackwardTile<Arithmetic>& tiles, const BackwardScratch<Arithmetic>& x, int64_t block,
                       const Acc* dq) {
    const ForwardParams& p = tiles.p;
    const SequenceInfo& sequence = tiles.rules.sequence;
    const TensorView& view = tiles.params.dq;
    const int64_t m_begin = block * x.ldm, rows = max(0, min(x.ldm, sequence.seqlen_q - m_begin));
    if (rows > 0) {
      const Acc* lse = tiles.row_lse(m_begin);
      for (int64_t lane = 0; lane < x.ldm; ++lane) {
        x.factor[lane] = lane < rows && lse[lane] != kInfinity<Acc> ? tiles.rules.scale : Acc(0);
      }
      store_transposed<Acc>(dq + block * x.ldd * x.ldm, x.ldm, rows, p.head_dim, x.factor, tiles.q_row(view, m_begin),
                            p.dtype, view.row);
    }
    const int64_t end = min(m_begin + x.ldm, sequence.seqlen_q_padded);
    if (m_begin + rows < end) {
      clear_rows(tiles.q_row(view, m_begin + rows), p.dtype, end - m_begin - rows, p.head_dim, view.row);
    }
  }

 private:
  int64_t b() const { return index_ / context_.splits / context_.params.forward.num_heads_k; }
  int64_t k_head() const { return index_ / context_.splits % context_.params.forward.num_heads_k; }
  int64_t h() const { return k_head() * context_.group_size() + context_.group_head; }

  /// Keys [block * kBackwardBlockN, ...) with every row that sees them.
  void run_block(int64_t block) {
    const SequenceInfo& sequence = tiles_.rules.sequence;
    const int64_t n_begin = block * kBackwardBlockN;
    const int64_t columns = min(kBackwardBlockN, sequence.seqlen_k - n_begin);
    const int64_t first_block = k_head() * context_.key_blocks() + context_.first_key_block(sequence, b());
    const int64_t first_row = first_block * kBackwardBlockN + n_begin;
    dk_ = context_.dk == nullptr ? own_dk_ : context_.dk + first_row * x_.ldd;
    dv_ = context_.dv == nullptr ? own_dv_ : context_.dv + first_row * x_.ldv;
    if (context_.group_head == 0) {
      std::memset(dk_, 0, size_t(kBackwardBlockN * x_.ldd) * sizeof(Acc));
      std::memset(dv_, 0, size_t(kBackwardBlockN * x_.ldv) * sizeof(Acc));
    }
    if (columns > 0) {
      const Range rows = visible_rows(tiles_.p, sequence, n_begin, n_begin + columns);
      if (!rows.empty()) tiles_.load_keys(n_begin, columns);
      for (int64_t m_block = max(rows.begin, 0) / x_.ldm; m_block * x_.ldm < rows.end; ++m_block) {
        const int64_t m_begin = m_block * x_.ldm;
        Tile tile{m_begin, min(x_.ldm, sequence.seqlen_q - m_begin), n_begin, columns, 0, 0};
        if (plan_tile<Acc>(tiles_.rules, tile)) process_tile(tile, m_block);
      }
    }
    if (context_.last_of_group()) store_keys(n_begin, max(0, columns));
  }

  void process_tile(const Tile& tile, int64_t m_block) {
    const BackwardParams& params = context_.params;
    const ForwardParams& p = params.forward;
    const bool want_ds = context_.wants_ds;
    const QueryBlock<Arithmetic>& block = queries(tile, m_block);
    const Operand* keys;
    tiles_.compute(tile, block, want_ds, false, context_.slopes != nullptr ? &dslope_ : nullptr, keys);
    tiles_.pack_probabilities(tile, want_ds);
    const int64_t lane = tile.lane_begin, lanes = tile.lane_end - lane, ldm = x_.ldm, first = lane / kPack;
    if (params.dv.data != nullptr) {
      gemm<Arithmetic, Layout::kRowMajor>(tile.columns, x_.ldv, lanes / kPack, x_.p_rows + first, ldm / kPack,
                                          block.dout_across + first * x_.ldv, x_.ldv, dv_, x_.ldv, true);
    }
    if (params.dk.data != nullptr) {
      gemm<Arithmetic, Layout::kRowMajor>(tile.columns, x_.ldd, lanes / kPack, x_.ds_rows + first, ldm / kPack,
                                          block.q_across + first * x_.ldd, x_.ldd, dk_, x_.ldd, true);
    }
    if (params.dq.data != nullptr) {
      gemm<Arithmetic, Layout::kDepthMajor>(p.head_dim, lanes, (tile.columns + kPack - 1) / kPack, keys, x_.ldd,
                                            x_.ds_across + lane, ldm, dq_ + m_block * x_.ldd * ldm + lane, ldm, true);
    }
  }

  const QueryBlock<Arithmetic>& queries(const Tile& tile, int64_t m_block) {
    const bool keep = context_.query_blocks > 1;
    const int64_t slot = keep ? m_block : 0;
    if (!keep || packed_[slot] == 0) tiles_.load_queries(tile.m_begin, tile.rows, x_.queries[slot]);
    packed_[slot] = 1;
    return x_.queries[slot];
  }

  void store_keys(int64_t n_begin, int64_t columns) {
    const BackwardParams& params = context_.params;
    const ForwardParams& p = params.forward;
    const int64_t end = min(n_begin + kBackwardBlockN, tiles_.rules.sequence.seqlen_k_padded);
    const int64_t unused = end - n_begin - columns;
    const auto store = [&](const TensorView& view, const Acc* sums, int64_t ld, int64_t width, Acc factor) {
      if (view.data == nullptr) return;
      store_rows<Acc>(sums, ld, columns, width, factor, tiles_.k_row(view, n_begin), p.dtype, view.row);
      if (unused > 0) clear_rows(tiles_.k_row(view, n_begin + columns), p.dtype, unused, width, view.row);
    };
    store(params.dk, dk_, x_.ldd, p.head_dim, tiles_.rules.scale);
    store(params.dv, dv_, x_.ldv, p.head_dim_v, Acc(1));
  }

  const Context& context_;
  const int64_t index_;
  Arena arena_;
  const BackwardScratch<Arithmetic> x_;
  BackwardTile<Arithmetic> tiles_;
  const int64_t m_blocks_, n_blocks_;  // of this sequence
  Acc *own_dq_, *own_dk_, *own_dv_;
  uint8_t* packed_;  // (query_blocks): which of them are
  Acc *dq_ = nullptr, *dk_ = nullptr, *dv_ = nullptr;
  double dslope_ = 0.0;
};

template <typename Arithmetic>
void key_range_task(const void* context, int64_t index, void* scratch) {
  const auto& c = *static_cast<const BackwardContext<Arithmetic>*>(context);
  const int64_t b = index / c.splits / c.params.forward.num_heads_k;
  const MatrixUnit unit;
  KeyRange<Arithmetic>(c, sequence_info(c.params.forward, b), index, scratch).run();
}

/// Adds up the splits' dq. Task `index` is (sequence, head of k, block of rows).
template <typename Arithmetic>
void reduce_dq_task(const void* context, int64_t index, void* scratch) {
  using Acc = typename Arithmetic::Acc;
  const auto& c = *static_cast<const BackwardContext<Arithmetic>*>(context);
  const ForwardParams& p = c.params.forward;
  const int64_t block = index % c.m_blocks, head = index / c.m_blocks;
  const int64_t b = head / p.num_heads_k, h = head % p.num_heads_k * c.group_size() + c.group_head;
  const SequenceInfo sequence = sequence_info(p, b);
  if (block * c.ldm >= sequence.seqlen_q_padded) return;  // other sequences are longer
  Acc* sums = c.dq + head * c.splits * c.dq_size();
  const int64_t size = c.ldd * c.ldm;
  for (int64_t split = 1; split < c.splits; ++split) {
    const Acc* other = sums + split * c.dq_size() + block * size;
    for (int64_t i = 0; i < size; i += kLanes<Acc>) {
      store<Acc>(sums + block * size + i, load<Acc>(sums + block * size + i) + load<Acc>(other + i));
    }
  }
  Arena arena(scratch);
  const BackwardScratch<Arithmetic> x(p, 1, arena);
  const BackwardTile<Arithmetic> tiles(c.params, c.statistics, sequence, b, h, x);
  KeyRange<Arithmetic>::store_dq(tiles, x, block, sums);
}

template <typename T>
void store_slopes(const BackwardParams& params, const double* slopes, int64_t splits) {
  const ForwardParams& p = params.forward;
  const int64_t rows = params.slopes_have_batch ? p.batch : 1;
  for (int64_t i = 0; i < rows * p.num_heads; ++i) {
    double sum = 0.0;
    for (int64_t b = i / p.num_heads; b < p.batch; b += rows) {
      const double* of_head = slopes + (b * p.num_heads + i % p.num_heads) * splits;
      for (int64_t split = 0; split < splits; ++split) sum += of_head[split];
    }
    static_cast<T*>(params.dslopes)[i] = T(sum);
  }
}

/// Rows of the packed gradients behind the last sequence.
void clear_unused_rows(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const auto clear = [&](const TensorView& view, const int32_t* starts, int64_t total, int64_t heads, int64_t columns) {
    if (view.data == nullptr || starts == nullptr) return;
    clear_packed_rows(view, p.dtype, starts[p.batch], total, heads, columns);
  };
  clear(params.dq, p.cu_seqlens_q, p.total_q, p.num_heads, p.head_dim);
  clear(params.dk, p.cu_seqlens_k, p.total_k, p.num_heads_k, p.head_dim);
  clear(params.dv, p.cu_seqlens_k, p.total_k, p.num_heads_k, p.head_dim_v);
}

template <typename Arithmetic>
void run_keys(BackwardContext<Arithmetic>& context) {
  using Acc = typename Arithmetic::Acc;
  const BackwardParams& params = context.params;
  const ForwardParams& p = params.forward;
  const int64_t heads = p.batch * p.num_heads_k;
  const bool reduce = context.splits > 1 && params.dq.data != nullptr, group = context.group_size() > 1;
  const int64_t keys = group ? p.num_heads_k * context.key_blocks() * kBackwardBlockN : 0;
  const Buffer dq(reduce ? heads * context.splits * context.dq_size() * int64_t(sizeof(Acc)) : 0);
  const Buffer dk(keys * context.ldd * int64_t(sizeof(Acc))), dv(keys * context.ldv * int64_t(sizeof(Acc)));
  const Buffer slopes(p.batch * p.num_heads * context.splits * int64_t(sizeof(double)));
  if (reduce) context.dq = static_cast<Acc*>(dq.data());
  if (group) context.dk = static_cast<Acc*>(dk.data()), context.dv = static_cast<Acc*>(dv.data());
  if (params.dslopes != nullptr) context.slopes = static_cast<double*>(slopes.data());
  const int64_t bytes = heads > 0 ? KeyRange<Arithmetic>(context, {}, 0, nullptr).scratch_bytes() : 0;
  for (context.group_head = 0; context.group_head < context.group_size(); ++context.group_head) {
    run_tasks(heads * context.splits, bytes, key_range_task<Arithmetic>, &context);
    if (reduce) run_tasks(heads * context.m_blocks, bytes, reduce_dq_task<Arithmetic>, &context);
  }
  if (params.dslopes != nullptr) store_slopes<Acc>(params, context.slopes, context.splits);
}

template <typename Arithmetic>
void run(const BackwardParams& params) {
  using Acc = typename Arithmetic::Acc;
  const ForwardParams& p = params.forward;
  clear_unused_rows(params);
  const int64_t rows = p.num_heads * p.total_q;
  const int64_t bytes = rows * int64_t(sizeof(Acc));
  const Buffer lse(bytes), lost(bytes), delta(bytes);
  const RowStatistics<Acc> statistics{static_cast<Acc*>(lse.data()), static_cast<Acc*>(lost.data()),
                                      static_cast<Acc*>(delta.data())};
  const RowStatisticsContext<Acc> rows_context{params, statistics};
  run_tasks(p.batch * p.num_heads, 0, row_statistics_task<Acc>, &rows_context);
  find_lost_of_lse<Arithmetic>(params, statistics);
  if (params.dsinks != nullptr) run_tasks(p.num_heads, 0, sink_gradient_task<Acc>, &rows_context);
  if (params.dmask != nullptr) run_mask_gradient<Arithmetic>(params, statistics);
  BackwardContext<Arithmetic> context(params);
  context.statistics = statistics;
  if ((context.wants_ds || params.dv.data != nullptr) && p.num_heads_k > 0) run_keys(context);
}

void run_backward(const BackwardParams& params) {
#if defined(__AVX512BF16__)
  if (params.forward.dtype == DType::kBFloat16) return run<BFloat16Pairs>(params);
#else
  if (params.forward.dtype == DType::kFloat64) return run<Plain<double> >(params);
  run<Plain<float> >(params);
#endif
}

}  // namespace
}  // namespace flash_attn::cpu
