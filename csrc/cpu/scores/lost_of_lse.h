// What lse, one number of limited precision, cannot hold of a row's scores where these are very large: the logarithm of
// the sum beside the maximum. Backward needs it, P = exp((S - lse) - lost), and counts such rows again
// (benchmarks/experiments/097).
#pragma once

#include "../backward/tile.h"
#include "online_softmax.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

/// From which lse on rows are counted again: below, P is off by less than 2^-17, of inputs of 16 bits by 2^-12. In
/// double hardly anything but masks of the smallest number gets there.
inline bool is_large_lse(DType dtype, double lse) {
  const double large = dtype == DType::kFloat64 ? 0x1p37 : dtype == DType::kFloat32 ? kLeastLargeLse : 0x1p12;
  const double size = lse < 0 ? -lse : lse;
  return size >= large && size < kInfinity<double>;
}

template <typename Arithmetic>
struct LostOfLseContext {
  const BackwardParams& params;
  RowStatistics<typename Arithmetic::Acc> statistics;
};

/// Rows of one head of one sequence.
template <typename Arithmetic>
class LostOfLse {
 public:
  using Acc = typename Arithmetic::Acc;

  LostOfLse(const LostOfLseContext<Arithmetic>& context, const SequenceInfo& sequence, int64_t b, int64_t h,
            void* scratch)
      : arena_(scratch),
        x_(context.params.forward, 1, arena_),
        tiles_(context.params, context.statistics, sequence, b, h, x_),
        lse_(context.statistics.lse + first_row_statistic(tiles_.p, sequence, b, h)),
        lost_(context.statistics.lost + first_row_statistic(tiles_.p, sequence, b, h)) {
    row_max_ = arena_.template take<Acc>(x_.ldm);
    row_sum_ = arena_.template take<Acc>(x_.ldm);
    rescale_ = arena_.template take<Acc>(x_.ldm);
  }
  int64_t scratch_bytes() const { return arena_.used(); }

  void run() {
    const SequenceInfo& sequence = tiles_.rules.sequence;
    for (int64_t m = 0; m < sequence.seqlen_q; m += x_.ldm) {
      const int64_t rows = min(x_.ldm, sequence.seqlen_q - m);
      bool large = false;
      for (int64_t i = m; i < m + rows; ++i) large = large || is_large_lse(tiles_.p.dtype, lse_[i]);
      if (large) count_again(m, rows);
    }
  }

 private:
  void count_again(int64_t m, int64_t rows) {
    const ForwardParams& p = tiles_.p;
    for (int64_t lane = 0; lane < x_.ldm; ++lane) row_max_[lane] = -kInfinity<Acc>, row_sum_[lane] = Acc(0);
    tiles_.load_queries(m, rows, x_.queries[0]);
    for (int64_t n = 0; n < tiles_.rules.sequence.seqlen_k; n += kBackwardBlockN) {
      Tile tile{m, rows, n, min(kBackwardBlockN, tiles_.rules.sequence.seqlen_k - n), 0, 0};
      if (!plan_tile<Acc>(tiles_.rules, tile)) continue;
      tiles_.load_keys(n, tile.columns);
      tiles_.compute_scores(tile, x_.queries[0]);
      const Softmax<Plain<Acc>> softmax{tiles_.rules.exponent_scale, row_max_, row_sum_, rescale_, x_.ldm};
      softmax.template apply<false>(tile, x_.s, x_.s, nullptr);
    }
    const Acc unit = tiles_.rules.extended ? Acc(1) : tiles_.rules.scale;
    for (int64_t lane = 0; lane < x_.ldm; lane += kLanes<Acc>) {
      const Vec<Acc> lse = load<Acc>(x_.queries[0].lse + lane);
      store<Acc>(rescale_ + lane, less_lse<Acc>(load<Acc>(row_max_ + lane), unit, lse));
    }
    const double sink = p.sinks != nullptr ? double(static_cast<const Acc*>(p.sinks)[tiles_.h]) : -kInfinity<double>;
    for (int64_t lane = 0; lane < rows; ++lane) {
      const double lse = double(lse_[m + lane]);
      if (!is_large_lse(p.dtype, lse)) continue;
      const double by_keys = double(rescale_[lane]) + __builtin_log(double(row_sum_[lane])), by_sink = sink - lse;
      const double high = by_keys > by_sink ? by_keys : by_sink;
      const double lost = high + __builtin_log(__builtin_exp(by_keys - high) + __builtin_exp(by_sink - high));
      // If it is more than rounding takes, lse is not of these keys alone: the caller's business.
      const double rounding = (lse < 0 ? -lse : lse) * (std::is_same_v<Acc, double> ? 0x1p-47 : 0x1p-18);
      if (lost <= rounding && lost >= -rounding) lost_[m + lane] = Acc(lost);
    }
  }

  Arena arena_;
  const BackwardScratch<Arithmetic> x_;
  BackwardTile<Arithmetic> tiles_;
  const Acc* lse_;
  Acc *lost_, *row_max_, *row_sum_, *rescale_;
};

/// Task `index` is (sequence, head).
template <typename Arithmetic>
void lost_of_lse_task(const void* context, int64_t index, void* scratch) {
  const auto& c = *static_cast<const LostOfLseContext<Arithmetic>*>(context);
  const ForwardParams& p = c.params.forward;
  const int64_t b = index / p.num_heads;
  const MatrixUnit unit;
  LostOfLse<Arithmetic>(c, sequence_info(p, b), b, index % p.num_heads, scratch).run();
}

/// Of all rows; 0 as a rule, when nothing is computed.
template <typename Arithmetic>
void find_lost_of_lse(const BackwardParams& params, const RowStatistics<typename Arithmetic::Acc>& statistics) {
  using Acc = typename Arithmetic::Acc;
  const ForwardParams& p = params.forward;
  bool large = false;
  std::memset(statistics.lost, 0, size_t(p.num_heads * p.total_q) * sizeof(Acc));
  for (int64_t b = 0; b < p.batch; ++b) {
    const SequenceInfo sequence = sequence_info(p, b);
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const Acc* lse = statistics.lse + first_row_statistic(p, sequence, b, h);
      for (int64_t i = 0; i < sequence.seqlen_q; ++i) large = large || is_large_lse(p.dtype, lse[i]);
    }
  }
  if (!large) return;
  const LostOfLseContext<Arithmetic> context{params, statistics};
  const int64_t bytes = LostOfLse<Arithmetic>(context, {}, 0, 0, nullptr).scratch_bytes();
  run_tasks(p.batch * p.num_heads, bytes, lost_of_lse_task<Arithmetic>, &context);
}

}  // namespace
}  // namespace flash_attn::cpu
