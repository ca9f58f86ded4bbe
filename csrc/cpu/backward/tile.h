// One tile of the backward pass: from rows of q, k, v, dout and the forward's lse to P and dS. Transposed like the
// forward pass: (key column, query row), query rows as lanes.
#pragma once

#include "../isa.h"
#include "../parallel.h"
#include "../scores/random.h"
#include "../scores/scores.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

/// The least lse, either way, of which something that matters is lost in float32.
constexpr double kLeastLargeLse = 0x1p7;

/// lse, what is lost of it (scores/lost_of_lse.h) and delta = sum(dout * out) - dlse, (num_heads, total_q). lse is +inf
/// where a row sees nothing: P is 0.
template <typename T>
struct RowStatistics {
  T *lse, *lost, *delta;
};

/// Where the rows of head h of sequence b start in there.
inline int64_t first_row_statistic(const ForwardParams& p, const SequenceInfo& sequence, int64_t b, int64_t h) {
  return h * p.total_q + (p.is_varlen_q() ? sequence.q_row : b * p.seqlen_q);
}

/// The score in natural units, less lse. In one place, so that it is rounded alike wherever it is used.
template <typename T>
FLASH_ATTN_INLINE Vec<T> less_lse(Vec<T> score, T unit, Vec<T> lse) {
  return score * unit - lse;
}

/// A block of query rows, packed.
template <typename Arithmetic>
struct QueryBlock {
  using Operand = typename Arithmetic::Operand;
  Operand *q_t, *dout_t;            // (ldk, ldm), (lde, ldm)
  Operand *q_across, *dout_across;  // (ldm / kPack, ldd), (ldm / kPack, ldv)
  // (ldm); lse is +inf in lanes without a row, or whose row sees nothing
  typename Arithmetic::Acc *lse, *lost, *delta;
};

template <typename Arithmetic>
struct BackwardScratch {
  using Acc = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  static constexpr int kPack = Arithmetic::kPack;
  int64_t ldm;                            // rows of a block
  int64_t ldk, ldd;                       // head_dim: in operands along a row, in columns
  int64_t lde, ldv;                       // head_dim_v: the same
  Operand *k_rows, *v_rows;               // (kBackwardBlockN, ldk), (kBackwardBlockN, lde)
  Operand *k_across, *k_clean;            // (kBackwardBlockN / kPack, ldd), the second without dead columns' keys
  QueryBlock<Arithmetic>* queries;        // (query_blocks)
  Acc *s, *ds;                            // (kBackwardBlockN, ldm): q.k, then P; dP, then dS
  Acc *bias, *softcap_slope;              // as s; the second: derivative of the softcap
  uint8_t* bytes;                         // (kBackwardBlockN, byte_stride(ldm)): bool mask, then dropout
  Operand *p_rows, *ds_rows, *ds_across;  // P and dS as operands: (kBackwardBlockN, ldm / kPack) along rows, and
                                          // (kBackwardBlockN / kPack, ldm) across
  Acc* factor;                            // (ldm)
  uint8_t *drop, *dead;                   // (ldm): rows that see nothing; (kBackwardBlockN)

  /// `query_blocks`: how many blocks of queries are kept.
  BackwardScratch(const ForwardParams& params, int64_t query_blocks, Arena& arena) {
    constexpr int W = kLanes<Acc>;
    constexpr int64_t kN = kBackwardBlockN;
    ldm = max(W, min(kBackwardBlockM, round_up(params.seqlen_q, W)));
    ldk = round_up((params.head_dim + kPack - 1) / kPack, kPadding<Acc>);
    lde = round_up((params.head_dim_v + kPack - 1) / kPack, kPadding<Acc>);
    ldd = round_up(params.head_dim, kPadding<Acc>);
    ldv = round_up(params.head_dim_v, kPadding<Acc>);
    k_rows = arena.take<Operand>(kN * ldk);
    v_rows = arena.take<Operand>(kN * lde);
    k_across = kPack == 1 ? k_rows : arena.take<Operand>(kN / kPack * ldd);
    k_clean = params.mask.data != nullptr ? arena.take<Operand>(kN / kPack * ldd) : nullptr;
    queries = arena.take<QueryBlock<Arithmetic>>(query_blocks);
    for (int64_t i = 0; i < query_blocks; ++i) {
      const QueryBlock<Arithmetic> block{arena.take<Operand>(ldk * ldm),
                                         arena.take<Operand>(lde * ldm),
                                         arena.take<Operand>(ldm / kPack * ldd),
                                         arena.take<Operand>(ldm / kPack * ldv),
                                         arena.take<Acc>(ldm),
                                         arena.take<Acc>(ldm),
                                         arena.take<Acc>(ldm)};
      if (queries != nullptr) queries[i] = block;
    }
    s = arena.take<Acc>(kN * ldm);
    ds = arena.take<Acc>(kN * ldm);
    bias = params.mask.data != nullptr ? arena.take<Acc>(kN * ldm) : nullptr;
    bytes = arena.take<uint8_t>(kN * byte_stride(ldm));
    softcap_slope = params.softcap > 0.0 ? arena.take<Acc>(kN * ldm) : nullptr;
    if constexpr (kPack == 1) {
      p_rows = s;
      ds_rows = ds_across = ds;
    } else {
      p_rows = arena.take<Operand>(kN * ldm / kPack);
      ds_rows = arena.take<Operand>(kN * ldm / kPack);
      ds_across = arena.take<Operand>(kN / kPack * ldm);
    }
    factor = arena.take<Acc>(ldm);
    drop = arena.take<uint8_t>(ldm);
    dead = arena.take<uint8_t>(kN);
  }
};

/// Everything that a tile of head h of sequence b goes through.
template <typename Arithmetic>
class BackwardTile {
 public:
  using Acc = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  static constexpr int kPack = Arithmetic::kPack;

  BackwardTile(const BackwardParams& params, const RowStatistics<Acc>& statistics, const SequenceInfo& sequence,
               int64_t b, int64_t h, const BackwardScratch<Arithmetic>& scratch)
      : params(params),
        p(params.forward),
        rules(p, sequence, b, h),
        b(b),
        h(h),
        k_head(h / p.group_size()),
        keep_scale(p.dropout_p > 0.0 ? Acc(make_dropout(p.rng_state, p.dropout_p).scale) : Acc(1)),
        x(scratch),
        lse_(statistics.lse + first_row_statistic(p, sequence, b, h)),
        lost_(statistics.lost + first_row_statistic(p, sequence, b, h)),
        delta_(statistics.delta + first_row_statistic(p, sequence, b, h)) {}

  /// Element (row, head, 0) of this sequence; `row` counts from its start, `first` is that start in the tensor.
  void* at(const TensorView& t, int64_t head, int64_t first, int64_t row) const {
    return static_cast<char*>(t.data) + (b * t.batch + (first + row) * t.row + head * t.head) * size_of(p.dtype);
  }
  void* q_row(const TensorView& t, int64_t row) const { return at(t, h, rules.sequence.q_row, row); }
  void* k_row(const TensorView& t, int64_t row) const { return at(t, k_head, rules.sequence.k_row, row); }

  /// lse of the rows from m_begin on
  const Acc* row_lse(int64_t m_begin) const { return lse_ + m_begin; }

  void load_keys(int64_t n_begin, int64_t columns) {
    const Rows k{k_row(p.k, n_begin), p.dtype, p.k.row, columns, p.head_dim};
    const Rows v{k_row(p.v, n_begin), p.dtype, p.v.row, columns, p.head_dim_v};
    const int64_t padded = round_up(columns, kGemmRows);
    pack_rows<Arithmetic>(k, padded, x.k_rows, x.ldk);
    pack_rows<Arithmetic>(v, padded, x.v_rows, x.lde);
    if constexpr (kPack > 1) pack_across<Arithmetic>(k, padded, x.k_across, x.ldd);
  }

  /// Rows that see nothing at all are read as 0, whatever q and dout hold there.
  void load_queries(int64_t m_begin, int64_t rows, const QueryBlock<Arithmetic>& block) {
    const Acc* lse = row_lse(m_begin);
    const Acc* lost = lost_ + m_begin;
    const Acc* delta = delta_ + m_begin;
    for (int64_t lane = 0; lane < x.ldm; ++lane) {
      block.lse[lane] = lane < rows ? lse[lane] : kInfinity<Acc>;
      block.lost[lane] = lane < rows ? lost[lane] : Acc(0);
      block.delta[lane] = lane < rows ? delta[lane] : Acc(0);
      x.drop[lane] = block.lse[lane] == kInfinity<Acc>;
    }
    const Rows q{q_row(p.q, m_begin), p.dtype, p.q.row, rows, p.head_dim, x.drop};
    const Rows dout{q_row(params.dout, m_begin), p.dtype, params.dout.row, rows, p.head_dim_v, x.drop};
    const int64_t padded = round_up(rows, kLanes<Acc>);
    pack_transposed<Arithmetic>(q, padded, block.q_t, x.ldm);
    pack_transposed<Arithmetic>(dout, padded, block.dout_t, x.ldm);
    pack_across<Arithmetic>(q, padded, block.q_across, x.ldd);
    pack_across<Arithmetic>(dout, padded, block.dout_across, x.ldv);
  }

  /// x.s = the scores.
  void compute_scores(const Tile& tile, const QueryBlock<Arithmetic>& block) {
    const int64_t lane = tile.lane_begin, lanes = tile.lane_end - tile.lane_begin, ldm = x.ldm;
    gemm<Arithmetic, Layout::kRowMajor>(tile.columns, lanes, (p.head_dim + kPack - 1) / kPack, x.k_rows, x.ldk,
                                        block.q_t + lane, ldm, x.s + lane, ldm, false);
    apply_rules<Acc>(rules, tile, {x.s, x.bias, x.softcap_slope, x.bytes, ldm});
  }

  /// x.s = P after dropout, x.ds = dS toward the score before its softcap; `dslope` grows by what the tile adds. With
  /// `toward_bias` dS stays the gradient of the whole score. `k` is what dq is to be made of.
  void compute(const Tile& tile, const QueryBlock<Arithmetic>& block, bool want_ds, bool toward_bias, double* dslope,
               const Operand*& k) {
    const int64_t lane = tile.lane_begin, lanes = tile.lane_end - tile.lane_begin, ldm = x.ldm;
    compute_scores(tile, block);
    k = tile.masked && find_dead_columns<Acc>(tile, x.s, ldm, x.dead) ? clean_keys(tile) : x.k_across;
    if (p.dropout_p > 0.0) draw_dropout<Acc>(rules, tile, x.bytes, ldm);
    if (want_ds) {
      gemm<Arithmetic, Layout::kRowMajor>(tile.columns, lanes, (p.head_dim_v + kPack - 1) / kPack, x.v_rows, x.lde,
                                          block.dout_t + lane, ldm, x.ds + lane, ldm, false);
    }
    softmax_gradient(tile, block, want_ds);
    if (!want_ds) return;
    if (dslope != nullptr) *dslope += slope_gradient(tile);
    if (x.softcap_slope != nullptr && !toward_bias) {
      transform<Acc>(tile, x.ds, ldm, [&](Vec<Acc> ds, int64_t lane, int64_t n) {
        return ds * load<Acc>(x.softcap_slope + n * ldm + lane);
      });
    }
  }

  /// P and dS as operands: along rows for dv and dk, across them for dq.
  void pack_probabilities(const Tile& tile, bool want_ds) {
#if defined(__AVX512BF16__)
    constexpr int W = kLanes<float>;
    auto* p_rows = reinterpret_cast<BFloat16*>(x.p_rows);
    auto* ds_rows = reinterpret_cast<BFloat16*>(x.ds_rows);
    for (int64_t n = 0; n < tile.columns; n += 2) {
      const bool pair = n + 1 < tile.columns;
      for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += W) {
        const int64_t i = n * x.ldm + lane, next = i + x.ldm;  // one row more fits when columns are odd
        const HalfWordPairs p_pair = round_to_bfloat16(load<Acc>(x.s + i), load<Acc>(x.s + next));
        store_vector(p_rows + i, low_half(p_pair));
        store_vector(p_rows + next, high_half(p_pair));
        if (!want_ds) continue;
        const Vec<Acc> odd = pair ? load<Acc>(x.ds + next) : Vec<Acc>{};
        const HalfWordPairs ds_pair = round_to_bfloat16(load<Acc>(x.ds + i), odd);
        store_vector(ds_rows + i, low_half(ds_pair));
        store_vector(ds_rows + next, high_half(ds_pair));
        store_vector(x.ds_across + n / 2 * x.ldm + lane, interleave(ds_pair));
      }
    }
#else
    (void)tile, (void)want_ds;  // they are operands as they are
#endif
  }

  const BackwardParams& params;
  const ForwardParams& p;
  const ScoreRules<Acc> rules;
  const int64_t b, h, k_head;
  const Acc keep_scale;  // of dropout
  const BackwardScratch<Arithmetic>& x;

 private:
  const Operand* clean_keys(const Tile& tile) {
    std::memcpy(x.k_clean, x.k_across, size_t(kBackwardBlockN / kPack * x.ldd) * sizeof(Operand));
    for (int64_t n = 0; n < tile.columns; ++n) {
      if (x.dead[n] != 0) clear_row_across<Arithmetic>(x.k_clean, x.ldd, n);
    }
    return x.k_clean;
  }

  void softmax_gradient(const Tile& tile, const QueryBlock<Arithmetic>& block, bool want_ds) {
    const bool dropout = p.dropout_p > 0.0;
    const Acc unit = rules.extended ? Acc(1) : rules.scale;
    for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<Acc>) {
      const Vec<Acc> lse = load<Acc>(block.lse + lane), lost = load<Acc>(block.lost + lane);
      const Vec<Acc> delta = load<Acc>(block.delta + lane);
      const bool large = any_lane<Acc>((lse > Acc(kLeastLargeLse)) | (lse < Acc(-kLeastLargeLse)));
      for (int64_t n = 0; n < tile.columns; ++n) {
        const int64_t i = n * x.ldm + lane;
        Vec<Acc> exponent = less_lse<Acc>(load<Acc>(x.s + i), unit, lse);
        if (large) {
          exponent -= lost;
          exponent = exponent > Acc(0) ? -exponent : exponent;  // by rounding alone
        }
        const Vec<Acc> probability = exp2<Acc>(exponent, Acc(kLog2E));
        Vec<Acc> kept = probability, dp = want_ds ? load<Acc>(x.ds + i) : Vec<Acc>{};
        if (dropout) {
          const IntVec<Acc> dropped = load_bytes<Acc>(x.bytes + n * byte_stride(x.ldm) + lane) == 0;
          kept = dropped ? Vec<Acc>{} : kept * keep_scale;
          dp = dropped ? Vec<Acc>{} : dp * keep_scale;
        }
        store<Acc>(x.s + i, kept);
        // Where P is 0, dP may hold anything: a masked key may be NaN.
        if (want_ds) store<Acc>(x.ds + i, probability == Acc(0) ? Vec<Acc>{} : probability * (dp - delta));
      }
    }
  }

  double slope_gradient(const Tile& tile) const {
    Vec<Acc> sum{};
    for (int64_t n = 0; n < tile.columns; ++n) {
      for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<Acc>) {
        sum -= load<Acc>(x.ds + n * x.ldm + lane) * alibi_distance<Acc>(rules, tile, lane, n);
      }
    }
    double total = 0.0;
    for (int i = 0; i < kLanes<Acc>; ++i) total += double(sum[i]);
    return total;
  }

  const Acc *lse_, *lost_, *delta_;  // (seqlen_q)
};

}  // namespace
}  // namespace flash_attn::cpu
