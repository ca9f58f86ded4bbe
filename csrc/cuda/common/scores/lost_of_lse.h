// What lse, a number of limited precision, cannot hold of a row's scores where these are very large: the logarithm of
// their sum beside the largest one. In float32 at 2^20 lse moves in steps of 1/8; of a row that sees nothing but keys
// to which the smallest number is added, it is that number. Backward passes need it, P = exp(S - lse - lost), and count
// such rows again (benchmarks/experiments/097).
#pragma once

#include <cmath>
#include <type_traits>

#include "../../../sequence.h"
#include "bias_value.h"

namespace flash_attn::cuda {

/// The logarithm of a sum of exponentials.
template <typename Acc>
struct LogSum {
  Acc largest = -Acc(INFINITY), sum = Acc(0);  // relative to the largest

  FLASH_ATTN_DEVICE void add(Acc x, Acc count = Acc(1)) {
    if (x == -Acc(INFINITY)) return;
    const Acc high = x > largest ? x : largest;
    sum = sum * exp(largest - high) + count * exp(x - high);
    largest = high;
  }
  FLASH_ATTN_DEVICE void join_warp() {
#pragma unroll 1
    for (int distance = 16; distance > 0; distance /= 2) {
      const Acc other = __shfl_xor_sync(~0u, largest, distance), other_sum = __shfl_xor_sync(~0u, sum, distance);
      add(other, other_sum);
    }
  }
  FLASH_ATTN_DEVICE Acc value() const { return largest + log(sum); }
};

/// From which lse on rows are counted again. Below, P is off by less than 2^-11 in float32, by 2^-12 of 16-bit inputs.
/// In double hardly anything but masks of the smallest number gets there.
template <typename Element>
constexpr double kLargeLse = sizeof(Element) == 8   ? 0x1p37
                             : sizeof(Element) == 4 ? 0x1p13
                                                    : 0x1p12;

template <typename Element, typename Acc>
FLASH_ATTN_DEVICE bool is_large_lse(Acc lse) {
  return fabs(lse) >= Acc(kLargeLse<Element>) && fabs(lse) != Acc(INFINITY);
}

/// The rows of one head of one sequence. A score is the scaled sum of products of q and k in the order of columns, as
/// the universal kernels add it up: `changed` by rules, or else rounded together with lse.
template <typename Element, typename Acc>
struct RowCounter {
  const ForwardParams& p;
  const SequenceInfo& info;
  int64_t b, head;
  bool changed;

  FLASH_ATTN_DEVICE static Acc number(const Element& x) {
    if constexpr (sizeof(Element) == 2) {
      return static_cast<float>(x);
    } else {
      return x;
    }
  }

  /// By a warp, of one row: logarithm of the sum of exp(S - lse). mask_value(place): what attn_mask adds.
  template <typename MaskValue>
  FLASH_ATTN_DEVICE Acc count(int64_t row, Acc lse, const MaskValue& mask_value) const {
    const Acc scale = Acc(p.softmax_scale), softcap = Acc(p.softcap);
    const int64_t of_slope = b * p.alibi_batch_stride + head * p.alibi_head_stride;
    const Acc slope = p.alibi_slopes == nullptr ? Acc(0) : static_cast<const Acc*>(p.alibi_slopes)[of_slope];
    const int64_t of_mask = b * p.mask.batch + head * p.mask.head + row * p.mask.row;
    const Element* const q = static_cast<const Element*>(p.q.data) + (p.cu_seqlens_q != nullptr ? 0 : b) * p.q.batch +
                             (info.q_row + row) * p.q.row + head * p.q.head;
    const Element* const k = static_cast<const Element*>(p.k.data) + (p.cu_seqlens_k != nullptr ? 0 : b) * p.k.batch +
                             info.k_row * p.k.row + head / (p.num_heads / p.num_heads_k) * p.k.head;
    const Range keys = visible_columns(p, info, row);
    const int64_t end = clamp<int64_t>(keys.end, 0, info.seqlen_k);
    LogSum<Acc> sum;
#pragma unroll 1
    for (int64_t key = clamp<int64_t>(keys.begin, 0, end) + threadIdx.x % 32; key < end; key += 32) {
      const Element* const of_key = k + key * p.k.row;
      Acc s = Acc(0);
#pragma unroll(sizeof(Acc) == 8 ? 1 : 4)  // registers are few
      for (int c = 0; c < int(p.head_dim); ++c) s = fma(number(q[c]), number(of_key[c]), s);
      if (!changed) {
        sum.add(fma(s, scale, -lse));
        continue;
      }
      s *= scale;
      if (softcap > Acc(0)) s = softcap * tanh(s / softcap);
      if (slope != Acc(0)) s -= slope * fabs(Acc(row + info.diagonal - key));
      if (p.mask.data != nullptr) s += mask_value(of_mask + key * p.mask.col);
      sum.add(s - lse);
    }
    sum.join_warp();
    if (p.sinks != nullptr) sum.add(static_cast<const Acc*>(p.sinks)[head] - lse);
    return sum.value();
  }

  /// 0 as a rule, when nothing is counted. All lanes of a warp, each for a row of its own or for the same one.
  template <typename MaskValue>
  FLASH_ATTN_DEVICE Acc lost_of(int64_t row, Acc lse, const MaskValue& mask_value) const {
    constexpr Acc kRounding = sizeof(Acc) == 8 ? Acc(0x1p-47) : Acc(0x1p-18);  // more than rounding takes
    Acc lost = Acc(0);
#pragma unroll 1
    for (uint32_t rows = __ballot_sync(~0u, is_large_lse<Element>(lse)); rows != 0; rows &= rows - 1) {
      const int owner = __ffs(static_cast<int>(rows)) - 1;
      const Acc largest = __shfl_sync(~0u, lse, owner);
      const Acc x = count(__shfl_sync(~0u, row, owner), largest, mask_value);
      // If it is more, lse is not of these keys alone: that is the caller's business.
      if (int(threadIdx.x % 32) == owner && fabs(x) <= kRounding * fabs(largest)) lost = x;
    }
    return lost;
  }
};

}  // namespace flash_attn::cuda
