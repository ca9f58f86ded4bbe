// Gradient of attn_mask: dS, summed over the dimensions along which the mask is broadcast. A task owns a tile of the
// mask and goes over every tile of scores that it was added to, in a fixed order.
#pragma once

#include "tile.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

template <typename T>
struct MaskGradientContext {
  const BackwardParams& params;
  RowStatistics<T> statistics;
  int64_t row_blocks, column_blocks;  // of the mask: one where it is broadcast
};

template <typename Arithmetic>
class MaskGradientBlock {
 public:
  using Acc = typename Arithmetic::Acc;

  MaskGradientBlock(const MaskGradientContext<Acc>& context, void* scratch)
      : context_(context), p_(context.params.forward), arena_(scratch), x_(p_, 1, arena_) {
    sum_ = arena_.take<Acc>(kBackwardBlockN * x_.ldm);
  }
  int64_t scratch_bytes() const { return arena_.used(); }
  int64_t block_m() const { return x_.ldm; }

  /// Block (row_block, column_block) of the mask's slice (mask_b, mask_h).
  void run(int64_t mask_b, int64_t mask_h, int64_t row_block, int64_t column_block) {
    const MaskView& mask = p_.mask;
    row_begin_ = row_block * x_.ldm, column_begin_ = column_block * kBackwardBlockN;
    rows_ = min(x_.ldm, mask.row_size - row_begin_), columns_ = min(kBackwardBlockN, mask.col_size - column_begin_);
    std::memset(sum_, 0, size_t(kBackwardBlockN * x_.ldm) * sizeof(Acc));
    const bool one_batch = mask.batch_size > 1, one_head = mask.head_size > 1;
    for (int64_t b = one_batch ? mask_b : 0; b < (one_batch ? mask_b + 1 : p_.batch); ++b) {
      const SequenceInfo sequence = sequence_info(p_, b);
      for (int64_t h = one_head ? mask_h : 0; h < (one_head ? mask_h + 1 : p_.num_heads); ++h) {
        add_head(sequence, b, h);
      }
    }
    for (int64_t lane = 0; lane < x_.ldm; ++lane) x_.factor[lane] = Acc(1);
    Acc* out = static_cast<Acc*>(context_.params.dmask) +
               ((mask_b * mask.head_size + mask_h) * mask.row_size + row_begin_) * mask.col_size + column_begin_;
    store_transposed<Acc>(sum_, x_.ldm, rows_, columns_, x_.factor, out, statistics_dtype(p_.dtype), mask.col_size);
  }

 private:
  void add_head(const SequenceInfo& sequence, int64_t b, int64_t h) {
    BackwardTile<Arithmetic> tiles(context_.params, context_.statistics, sequence, b, h, x_);
    const bool all_rows = p_.mask.row_size == 1, all_columns = p_.mask.col_size == 1;
    const int64_t n_end = all_columns ? sequence.seqlen_k : min(column_begin_ + columns_, sequence.seqlen_k);
    const int64_t m_end = all_rows ? sequence.seqlen_q : min(row_begin_ + rows_, sequence.seqlen_q);
    for (int64_t n = all_columns ? 0 : column_begin_; n < n_end; n += kBackwardBlockN) {
      const int64_t columns = min(kBackwardBlockN, n_end - n);
      tiles.load_keys(n, columns);
      for (int64_t m = all_rows ? 0 : row_begin_; m < m_end; m += x_.ldm) {
        Tile tile{m, min(x_.ldm, m_end - m), n, columns, 0, 0};
        if (!plan_tile<Acc>(tiles.rules, tile)) continue;
        tiles.load_queries(m, tile.rows, x_.queries[0]);
        const typename Arithmetic::Operand* keys;
        tiles.compute(tile, x_.queries[0], true, true, nullptr, keys);
        add_tile(tile, all_rows, all_columns);
      }
    }
  }

  void add_tile(const Tile& tile, bool all_rows, bool all_columns) {
    for (int64_t n = 0; n < tile.columns; ++n) {
      Acc* sum = sum_ + (all_columns ? 0 : n * x_.ldm);
      for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<Acc>) {
        const Vec<Acc> ds = load<Acc>(x_.ds + n * x_.ldm + lane);
        if (!all_rows) {
          store<Acc>(sum + lane, load<Acc>(sum + lane) + ds);
        } else {
          for (int i = 0; i < kLanes<Acc>; ++i) sum[0] += ds[i];
        }
      }
    }
  }

  const MaskGradientContext<Acc>& context_;
  const ForwardParams& p_;
  Arena arena_;
  const BackwardScratch<Arithmetic> x_;
  Acc* sum_;  // (kBackwardBlockN, ldm)
  int64_t row_begin_ = 0, rows_ = 0, column_begin_ = 0, columns_ = 0;
};

/// Task `index` is (mask batch, mask head, row block, column block).
template <typename Arithmetic>
void mask_gradient_task(const void* context, int64_t index, void* scratch) {
  const MatrixUnit unit;
  const auto& c = *static_cast<const MaskGradientContext<typename Arithmetic::Acc>*>(context);
  const int64_t column_block = index % c.column_blocks, row_block = index / c.column_blocks % c.row_blocks;
  const int64_t slice = index / c.column_blocks / c.row_blocks, heads = c.params.forward.mask.head_size;
  MaskGradientBlock<Arithmetic>(c, scratch).run(slice / heads, slice % heads, row_block, column_block);
}

template <typename Arithmetic>
void run_mask_gradient(const BackwardParams& params, const RowStatistics<typename Arithmetic::Acc>& statistics) {
  MaskGradientContext<typename Arithmetic::Acc> context{params, statistics, 0, 0};
  const MaskGradientBlock<Arithmetic> size(context, nullptr);
  const MaskView& mask = params.forward.mask;
  context.row_blocks = (mask.row_size + size.block_m() - 1) / size.block_m();
  context.column_blocks = (mask.col_size + kBackwardBlockN - 1) / kBackwardBlockN;
  const int64_t tasks = mask.batch_size * mask.head_size * context.row_blocks * context.column_blocks;
  run_tasks(tasks, size.scratch_bytes(), mask_gradient_task<Arithmetic>, &context);
}

}  // namespace
}  // namespace flash_attn::cpu
