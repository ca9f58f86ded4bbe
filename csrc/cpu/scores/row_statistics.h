// What the backward pass needs of every query row before it starts, and the gradient of the sinks, which needs no more.
#pragma once

#include "../backward/tile.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

template <typename T>
struct RowStatisticsContext {
  const BackwardParams& params;
  RowStatistics<T> statistics;
};

/// sum over columns of a * b
template <typename T, typename Storage>
FLASH_ATTN_INLINE T dot(const Storage* a, const Storage* b, int64_t columns) {
  Vec<T> sum{};
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    sum += load_up_to<T>(a + c, columns - c) * load_up_to<T>(b + c, columns - c);
  }
  T total = T(0);
  for (int i = 0; i < kLanes<T>; ++i) total += sum[i];
  return total;
}

/// Task `index` is (sequence, head).
template <typename T>
void row_statistics_task(const void* context, int64_t index, void*) {
  const auto& task = *static_cast<const RowStatisticsContext<T>*>(context);
  const auto& params = task.params;
  const auto& statistics = task.statistics;
  const ForwardParams& p = params.forward;
  const int64_t b = index / p.num_heads, h = index % p.num_heads;
  const SequenceInfo sequence = sequence_info(p, b);
  const int64_t first = first_row_statistic(p, sequence, b, h);
  with_storage<T>(p.dtype, [&](auto type) {
    for (int64_t row = 0; row < sequence.seqlen_q; ++row) {
      const int64_t at = sequence.q_row + row, i = first + row;
      const T lse = static_cast<const T*>(p.lse.data)[b * p.lse.batch + h * p.lse.head + at * p.lse.row];
      const bool empty = lse == -kInfinity<T>;
      statistics.lse[i] = empty ? kInfinity<T> : lse;
      statistics.delta[i] = T(0);
      if (empty) continue;
      const auto* dout = static_cast<decltype(type)>(params.dout.data) + b * params.dout.batch + at * params.dout.row +
                         h * params.dout.head;
      const auto* out = static_cast<decltype(type)>(p.out.data) + b * p.out.batch + at * p.out.row + h * p.out.head;
      const RowView& dlse = params.dlse;
      statistics.delta[i] = dot<T>(dout, out, p.head_dim_v);
      if (dlse.data != nullptr) {
        statistics.delta[i] -= static_cast<const T*>(dlse.data)[b * dlse.batch + h * dlse.head + at * dlse.row];
      }
    }
  });
}

/// Task `index` is a head: dsink = -sum over rows of exp(sink - lse - lost) * delta.
template <typename T>
void sink_gradient_task(const void* context, int64_t index, void*) {
  const auto& task = *static_cast<const RowStatisticsContext<T>*>(context);
  const auto& params = task.params;
  const auto& statistics = task.statistics;
  const ForwardParams& p = params.forward;
  const double sink = double(static_cast<const T*>(p.sinks)[index]);
  double sum = 0.0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const SequenceInfo sequence = sequence_info(p, b);
    const int64_t first = first_row_statistic(p, sequence, b, index);
    for (int64_t i = first; i < first + sequence.seqlen_q; ++i) {
      if (statistics.lse[i] == kInfinity<T>) continue;
      const double exponent = sink - double(statistics.lse[i]) - double(statistics.lost[i]);
      sum -= __builtin_exp(exponent) * double(statistics.delta[i]);
    }
  }
  static_cast<T*>(params.dsinks)[index] = T(sum);
}

}  // namespace
}  // namespace flash_attn::cpu
