// Where these kernels are faster than the family's others: their blocks take an SM each and own twice as many rows. A
// few constants fitted to times on an H200, of which 1 is what a large block takes for one row that it walks over.
#pragma once

#include "../../../sequence.h"
#include "float32.h"

namespace flash_attn::cuda::universal::float32 {

/// What `blocks` take that take 1 alone on an SM; `together[i]` is what i + 1 of them take on one, which at most kFit
/// share.
template <int kFit>
double time_of(int64_t blocks, int num_sms, const double (&together)[kFit]) {
  const int64_t all = int64_t{num_sms} * kFit, rest = blocks % all;
  return double(blocks / all) * together[kFit - 1] + (rest > 0 ? together[(rest - 1) / num_sms] : 0.0);
}
/// The same where they have the SM to themselves. `uneven`: the last ones are short, and fill gaps.
inline double time_of_large(int64_t blocks, int num_sms, bool uneven) {
  return uneven ? std::max(1.0, double(blocks) / num_sms) : double(ceil_div(blocks, num_sms));
}

/// The others compute rules of scores at a higher price.
inline double price_of_rules(const ForwardParams& p) { return is_extended(p) ? 1.2 : 1.0; }

inline bool is_faster(const ForwardParams& params, int num_sms) {
  const ForwardParams p = mean_problem(params);
  const bool narrow = block_columns(p) == 64;
  const double price = narrow ? 1.02 : 1.11, start = narrow ? 85 : 56, large_start = narrow ? 125 : 69;
  const int64_t heads = p.batch * p.num_heads, keys = p.seqlen_k;
  constexpr double kTogether[] = {1.0, 1.3, 1.7};
  const double others = price * price_of_rules(p) * (double(keys) + start) *
                        time_of(heads * ceil_div(p.seqlen_q, int64_t{64}), num_sms, kTogether);
  const int64_t blocks = heads * ceil_div(p.seqlen_q, int64_t{kForwardTile.queries});
  return (double(keys) + large_start) * time_of_large(blocks, num_sms, p.window_right >= 0) < others;
}

/// dQ of the others is a kernel of its own, whose blocks own query rows, and all of theirs compute 64 columns.
inline bool is_faster(const BackwardParams& params, int num_sms) {
  const ForwardParams p = mean_problem(params.forward);
  const int64_t columns = std::max(p.head_dim, p.head_dim_v), parts = ceil_div(columns, int64_t{64});
  const double price_k = columns <= 64 ? 0.72 : 0.69, price_q = columns <= 64 ? 0.49 : 0.43;  // of dK and dV, of dQ
  constexpr double kStart = 60, kTogether[] = {1.0, 1.46};
  const auto of_others = [&](int64_t heads, int64_t rows) {
    return time_of(p.batch * heads * ceil_div(rows, int64_t{64}) * parts, num_sms, kTogether);
  };
  const double queries = double(p.seqlen_q * p.group_size()) + kStart, keys = double(p.seqlen_k) + kStart;
  const double others = price_of_rules(p) * (price_k * queries * of_others(p.num_heads_k, p.seqlen_k) +
                                             price_q * keys * of_others(p.num_heads, p.seqlen_q));
  const int64_t blocks = p.batch * p.num_heads_k * ceil_div(p.seqlen_k, int64_t{kBackwardTile.keys}) *
                         ceil_div(columns, int64_t{block_columns(params)});
  return queries * time_of_large(blocks, num_sms, false) < others;
}

}  // namespace flash_attn::cuda::universal::float32
