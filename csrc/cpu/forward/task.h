// A task of the forward pass: a few blocks of query rows of one head. It goes over the keys in tiles with the online
// softmax (Milakov and Gimelshein 2018; Dao et al. 2022), everything transposed: S = K Q^T (columns, rows), O^T += V^T
// P, so that query rows are lanes, row maxima and sums need no reduction across lanes, and k and v are read as they
// lie. All the task's blocks use a tile of k and v before the next is packed.
#pragma once

#include "../scores/online_softmax.h"
#include "../scores/random.h"
#include "few_rows.h"
#include "scratch.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

template <typename Arithmetic>
class ForwardTask {
 public:
  using Acc = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  static constexpr int kPack = Arithmetic::kPack;

  ForwardTask(const ForwardParams& params, const SequenceInfo& sequence, int64_t b, int64_t h, int64_t row_blocks,
              void* scratch)
      : params_(params),
        rules_(params, sequence, b, h),
        key_rows_(key_rows(params.cache, b)),
        b_(b),
        h_(h),
        arena_(scratch),
        x_(params, row_blocks, arena_) {}

  /// Row blocks from `m_block` on.
  void run(int64_t m_block) {
    if (m_block * x_.ldm >= rules_.sequence.seqlen_q_padded) return;  // other sequences are longer
    for (int64_t i = 0; i < x_.row_blocks; ++i) start(x_.rows[i], (m_block + i) * x_.ldm);
    process_columns({0, rules_.sequence.seqlen_k});
    for (int64_t i = 0; i < x_.row_blocks; ++i) finish(x_.rows[i]);
  }

  /// A row block's columns of one part alone: what the softmax knows of it then, and O^T, go to `partial`.
  void run_part(int64_t m_block, Range columns, Acc* partial) {
    RowBlock<Arithmetic>& block = x_.rows[0];
    start(block, m_block * x_.ldm);
    if (block.rows == 0) return;
    if (columns.begin > 0) forget(block);  // the sink: the first part has seen it
    process_columns(columns);
    std::memcpy(partial, block.row_max, size_t(x_.ldm) * sizeof(Acc));
    std::memcpy(partial + x_.ldm, block.row_sum, size_t(x_.ldm) * sizeof(Acc));
    std::memcpy(partial + 2 * x_.ldm, block.out_t, size_t(params_.head_dim_v * x_.ldm) * sizeof(Acc));
  }

  /// Puts the parts of a row block together.
  void combine(int64_t m_block, const Acc* partials, int64_t parts, int64_t partial_size) {
    RowBlock<Arithmetic>& block = x_.rows[0];
    block.begin = m_block * x_.ldm;
    block.rows = max(0, min(x_.ldm, rules_.sequence.seqlen_q - block.begin));
    if (block.rows > 0) {
      forget(block);
      for (int64_t part = 0; part < parts; ++part) add_part(block, partials + part * partial_size);
    }
    finish(block);
  }

 private:
  /// A tile of scores, of one of the row blocks.
  struct Visit {
    Tile tile;
    const RowBlock<Arithmetic>* block;
  };

  /// The row blocks' part of these columns.
  void process_columns(Range within) {
    Range columns{rules_.sequence.seqlen_k, 0};
    for (int64_t i = 0; i < x_.row_blocks; ++i) {
      if (x_.rows[i].rows == 0) continue;
      columns.begin = min(columns.begin, x_.rows[i].columns.begin);
      columns.end = max(columns.end, x_.rows[i].columns.end);
    }
    // Tiles are the same whichever blocks share them: their sums are rounded alike.
    columns.begin = max(columns.begin / kForwardBlockN * kForwardBlockN, within.begin);
    columns.end = min(columns.end, within.end);
    if (x_.few_rows) return process_few(x_.rows[0], columns);
    for (int64_t n = columns.begin; n < columns.end; n += kForwardBlockN) {
      const int64_t end = min(n + kForwardBlockN, columns.end);
      Visit visits[kMaxRowBlocks];
      int64_t count = 0;
      for (int64_t i = 0; i < x_.row_blocks; ++i) {
        Visit& visit = visits[count];
        visit.block = &x_.rows[i];
        if (make_tile(x_.rows[i], n, end, visit.tile)) ++count;
      }
      if (count > 0) load_keys(n, end - n);
      process_tiles(visits, count, n);
    }
  }

  /// Tiles of the columns that are loaded, which begin at n. On AMX the next scores are computed before the values are
  /// added: neither product then waits for the softmax before it, nor the softmax for its scores.
  void process_tiles(const Visit* visits, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || !kOnTiles) compute_scores(visits[i], n);
      const Operand* v = weigh_values(visits[i], n);
      if (kOnTiles && i + 1 < count) compute_scores(visits[i + 1], n);
      add_values(visits[i], v);
    }
  }

  /// The same for few rows, of which there is one block.
  void process_few(RowBlock<Arithmetic>& block, Range columns) {
    const int64_t rows = block.rows, ldm = x_.ldm;
    pack_rows<Arithmetic>(query_rows(rules_.sequence.q_row + block.begin, rows), rows, block.q_t, x_.ldk);
    std::memset(x_.out_rows, 0, size_t(rows * x_.ldv) * sizeof(Acc));
    for (int64_t n = columns.begin; n < columns.end; n += kForwardBlockN) {
      Tile tile;
      if (make_tile(block, n, min(n + kForwardBlockN, columns.end), tile)) process_few_tile(tile, block);
    }
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t c = 0; c < params_.head_dim_v; ++c) block.out_t[c * ldm + m] = x_.out_rows[m * x_.ldv + c];
    }
  }

  void process_few_tile(const Tile& tile, RowBlock<Arithmetic>& block) {
    const int64_t row = rules_.sequence.k_row + tile.n_begin;
    const auto values = [&] { return cached_rows(params_.v, row, tile.columns, params_.head_dim_v); };
    const Rows keys = cached_rows(params_.k, row, tile.columns, params_.head_dim);
    // What is gathered from pages takes the place of what was gathered before.
    const Rows next = key_rows_.pages == nullptr ? values() : keys;
    score_few_rows<Arithmetic>(keys, are_near() ? nullptr : &next, block.q_t, x_.ldk, block.rows, x_.s_rows,
                               kForwardBlockN);
    const bool ruled = has_rules<Acc>(rules_, tile);
    const bool dead = ruled && apply_rules_to_few(tile, block);
    if (params_.dropout_p > 0.0) draw_dropout<Acc>(rules_, tile, x_.bytes, x_.ldm);
    const Rows loaded = values();
    Acc factor[kFewRows<Acc>];
    for (int64_t m = 0; m < block.rows; ++m) {
      Acc* p = x_.s_rows + m * kForwardBlockN;
      factor[m] = softmax_few_row<Acc>(p, tile.columns, rules_.exponent_scale, block.row_max[m], block.row_sum[m]);
      for (int64_t n = 0; params_.dropout_p > 0.0 && n < tile.columns; ++n) {
        if (x_.bytes[n * byte_stride(x_.ldm) + m] == 0) p[n] = Acc(0);
      }
    }
    add_few_rows<Arithmetic>(loaded, block.rows, x_.s_rows, kForwardBlockN, dead ? x_.dead : nullptr, factor,
                             x_.out_rows, x_.ldv);
  }

  bool are_near() const {
    const int64_t columns = params_.num_heads_k * (params_.head_dim + params_.head_dim_v);
    return params_.total_k * columns * size_of(params_.dtype) <= kNearBytes;
  }

  /// The rules have rows as lanes. True: there are dead columns.
  bool apply_rules_to_few(const Tile& tile, const RowBlock<Arithmetic>& block) {
    const int64_t ldm = x_.ldm;
    std::memset(x_.s, 0, size_t(tile.columns * ldm) * sizeof(Acc));
    for (int64_t m = 0; m < block.rows; ++m) {
      for (int64_t n = 0; n < tile.columns; ++n) x_.s[n * ldm + m] = x_.s_rows[m * kForwardBlockN + n];
    }
    apply_rules<Acc>(rules_, tile, {x_.s, x_.bias, nullptr, x_.bytes, ldm});
    for (int64_t m = 0; m < block.rows; ++m) {
      for (int64_t n = 0; n < tile.columns; ++n) x_.s_rows[m * kForwardBlockN + n] = x_.s[n * ldm + m];
    }
    return has_dead_columns(tile, block);
  }

  bool has_dead_columns(const Tile& tile, const RowBlock<Arithmetic>& block) {
    return (tile.masked || tile.n_begin < block.columns.begin) && find_dead_columns<Acc>(tile, x_.s, x_.ldm, x_.dead);
  }

  void forget(RowBlock<Arithmetic>& block) {
    for (int64_t lane = 0; lane < x_.ldm; ++lane) {
      block.row_max[lane] = -kInfinity<Acc>;
      block.row_sum[lane] = Acc(0);
    }
    std::memset(block.out_t, 0, size_t(x_.ldv * x_.ldm) * sizeof(Acc));
  }

  void add_part(RowBlock<Arithmetic>& block, const Acc* partial) {
    const Acc scale = rules_.exponent_scale;
    for (int64_t lane = 0; lane < x_.ldm; lane += kLanes<Acc>) {
      const Vec<Acc> max_own = load<Acc>(block.row_max + lane), max_part = load<Acc>(partial + lane);
      const Vec<Acc> new_max = max<Acc>(max_part, max_own);
      const Vec<Acc> shift = new_max == -kInfinity<Acc> ? Vec<Acc>{} : new_max;  // -inf - -inf would be NaN
      const Vec<Acc> own = exp2<Acc>(max_own - shift, scale), other = exp2<Acc>(max_part - shift, scale);
      store<Acc>(block.row_max + lane, new_max);
      store<Acc>(block.row_sum + lane,
                 load<Acc>(block.row_sum + lane) * own + load<Acc>(partial + x_.ldm + lane) * other);
      for (int64_t c = 0; c < params_.head_dim_v; ++c) {
        Acc* out = block.out_t + c * x_.ldm + lane;
        store<Acc>(out, load<Acc>(out) * own + load<Acc>(partial + (2 + c) * x_.ldm + lane) * other);
      }
    }
  }

  Rows query_rows(int64_t row, int64_t count) const {
    const TensorView& t = params_.q;
    const char* data =
        static_cast<const char*>(t.data) + (b_ * t.batch + row * t.row + h_ * t.head) * size_of(params_.dtype);
    return {data, params_.dtype, t.row, count, params_.head_dim};
  }

  /// Rows of k or v. Those from pages are gathered, and are there until the next call.
  Rows cached_rows(const TensorView& t, int64_t row, int64_t count, int64_t columns) const {
    const int64_t size = size_of(params_.dtype), head = h_ / params_.group_size() * t.head;
    const char* const data = static_cast<const char*>(t.data);
    if (key_rows_.pages == nullptr) {
      return {data + (key_rows_.offset(t, row) + head) * size, params_.dtype, t.row, count, columns};
    }
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(x_.gathered + i * columns * size, data + (key_rows_.offset(t, row + i) + head) * size,
                  size_t(columns * size));
    }
    return {x_.gathered, params_.dtype, columns, count, columns};
  }

  void start(RowBlock<Arithmetic>& block, int64_t begin) {
    const SequenceInfo& sequence = rules_.sequence;
    block.begin = begin;
    block.rows = max(0, min(x_.ldm, sequence.seqlen_q - begin));
    if (block.rows == 0) return;
    block.columns = visible_columns(params_, sequence, begin, begin + block.rows);
    block.columns.begin = max(block.columns.begin, 0);
    if (!x_.few_rows) {
      pack_transposed<Arithmetic>(query_rows(sequence.q_row + begin, block.rows), round_up(block.rows, kLanes<Acc>),
                                  block.q_t, x_.ldm);
      const int64_t packed = (params_.head_dim + kPack - 1) / kPack * x_.ldm;
      std::memset(block.q_t + packed, 0, size_t(score_depth() * x_.ldm - packed) * sizeof(Operand));
    }
    // A sink is a key without a value: a score the row has seen before any other.
    const Acc* sinks = static_cast<const Acc*>(params_.sinks);
    const Acc first_max = sinks != nullptr ? sinks[h_] : -kInfinity<Acc>;
    for (int64_t lane = 0; lane < x_.ldm; ++lane) {
      block.row_max[lane] = first_max;
      block.row_sum[lane] = first_max > -kInfinity<Acc> || first_max != first_max ? Acc(1) : Acc(0);
    }
    std::memset(block.out_t, 0, size_t(x_.ldv * x_.ldm) * sizeof(Acc));
  }

  /// The block's part of columns [n, end). It starts at a whole operand of v.
  bool make_tile(const RowBlock<Arithmetic>& block, int64_t n, int64_t end, Tile& tile) const {
    const int64_t first = n + max(0, block.columns.begin - n) / kPack * kPack;
    tile = {block.begin, block.rows, first, min(end, block.columns.end) - first, 0, 0};
    return block.rows > 0 && tile.columns > 0 && plan_tile<Acc>(rules_, tile);
  }

  void load_keys(int64_t n, int64_t columns) {
    const int64_t row = rules_.sequence.k_row + n;
    pack_rows<Arithmetic>(cached_rows(params_.k, row, columns, params_.head_dim), round_up(columns, kGemmRows), x_.k,
                          x_.ldk);
    pack_values<Arithmetic, kForwardBlockN>(cached_rows(params_.v, row, columns, params_.head_dim_v), x_.v, x_.ldv);
  }

  /// Operands of q.k. On AMX with zeros up to whole tiles: registers of another width take longer to set up.
  int64_t score_depth() const { return kOnTiles ? x_.ldk : (params_.head_dim + kPack - 1) / kPack; }

  /// q.k of a tile among the columns loaded from n on.
  void compute_scores(const Visit& visit, int64_t n) {
    const Tile& tile = visit.tile;
    const int64_t lane = tile.lane_begin;
    gemm<Arithmetic, Layout::kRowMajor>(tile.columns, tile.lane_end - lane, score_depth(),
                                        x_.k + (tile.n_begin - n) * x_.ldk, x_.ldk, visit.block->q_t + lane, x_.ldm,
                                        x_.s + lane, x_.ldm, false);
  }

  /// From q.k to probabilities; O^T is relative to the same maxima after that. Returns the values they belong to.
  const Operand* weigh_values(const Visit& visit, int64_t n) {
    const Tile& tile = visit.tile;
    const RowBlock<Arithmetic>& block = *visit.block;
    const int64_t ldm = x_.ldm;
    apply_rules<Acc>(rules_, tile, {x_.s, x_.bias, nullptr, x_.bytes, ldm});
    const Operand* v = x_.v + (tile.n_begin - n) / kPack * value_stride();
    if (has_dead_columns(tile, block)) v = clean_values(tile, tile.n_begin - n, v);
    const bool drops = params_.dropout_p > 0.0;
    if (drops) draw_dropout<Acc>(rules_, tile, x_.bytes, ldm);
    const Softmax<Arithmetic> softmax{rules_.exponent_scale, block.row_max, block.row_sum, x_.factor, ldm};
    const bool rescales = drops ? softmax.template apply<true>(tile, x_.s, x_.p, x_.bytes)
                                : softmax.template apply<false>(tile, x_.s, x_.p, nullptr);
    if (rescales) rescale_out(tile, block);
    return v;
  }

  /// O^T += V^T P
  void add_values(const Visit& visit, const Operand* v) {
    const Tile& tile = visit.tile;
    const int64_t lane = tile.lane_begin;
    gemm<Arithmetic, kValueLayout>(params_.head_dim_v, tile.lane_end - lane, (tile.columns + kPack - 1) / kPack, v,
                                   kOnTiles ? kForwardBlockN / kPack : x_.ldv, x_.p + lane, x_.ldm,
                                   visit.block->out_t + lane, x_.ldm, true);
  }

  /// From the values of an operand's keys to the next one's.
  int64_t value_stride() const { return kOnTiles ? 1 : x_.ldv; }

  /// The same values, those of dead columns zero. `before`: keys loaded before the tile's, whose first value is at v.
  const Operand* clean_values(const Tile& tile, int64_t before, const Operand* v) {
    std::memcpy(x_.v_clean, x_.v, size_t(kForwardBlockN / kPack * x_.ldv) * sizeof(Operand));
    for (int64_t n = 0; n < tile.columns; ++n) {
      if (x_.dead[n] != 0) clear_value<Arithmetic, kForwardBlockN>(x_.v_clean, x_.ldv, before + n);
    }
    return x_.v_clean + (v - x_.v);
  }

  void rescale_out(const Tile& tile, const RowBlock<Arithmetic>& block) {
    const int64_t ldm = x_.ldm, columns = params_.head_dim_v;  // read once: a store might change members
    for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<Acc>) {
      const Vec<Acc> factor = load<Acc>(x_.factor + lane);
      if (!any_lane<Acc>(factor != Acc(1))) continue;
      Acc* out = block.out_t + lane;
      for (int64_t c = 0; c < columns; ++c, out += ldm) store<Acc>(out, load<Acc>(out) * factor);
    }
  }

  /// Writes the block's rows, and those after it that the sequence has but does not use.
  void finish(const RowBlock<Arithmetic>& block) {
    const Acc keep_scale =
        params_.dropout_p > 0.0 ? Acc(make_dropout(params_.rng_state, params_.dropout_p).scale) : Acc(1);
    const double unit = rules_.extended ? 1.0 : params_.softmax_scale;
    for (int64_t lane = 0; lane < block.rows; lane += kLanes<Acc>) {
      const Vec<Acc> sum = load<Acc>(block.row_sum + lane);
      store<Acc>(x_.factor + lane, sum == Acc(0) ? Vec<Acc>{} : keep_scale / sum);
      double maxima[kLanes<Acc>];
      for (int i = 0; i < kLanes<Acc>; ++i) maxima[i] = double(block.row_max[lane + i]) * unit;
      Acc values[kLanes<Acc>];
      store<Acc>(values, sum == Acc(0) ? broadcast<Acc>(-kInfinity<Acc>) : add_log(maxima, sum));
      for (int64_t i = 0; i < min(kLanes<Acc>, block.rows - lane); ++i) lse(block.begin + lane + i) = values[i];
    }
    for (int64_t lane = block.rows; lane < x_.ldm; ++lane) x_.factor[lane] = Acc(0);
    if (block.rows > 0) {
      store_transposed<Acc>(block.out_t, x_.ldm, block.rows, params_.head_dim_v, x_.factor, out_row(block.begin),
                            params_.dtype, params_.out.row);
    }
    const int64_t begin = block.begin + block.rows, end = min(block.begin + x_.ldm, rules_.sequence.seqlen_q_padded);
    if (begin < end) {
      clear_rows(out_row(begin), params_.dtype, end - begin, params_.head_dim_v, params_.out.row);
    }
    for (int64_t row = begin; row < end; ++row) lse(row) = -kInfinity<Acc>;
  }

  void* out_row(int64_t row) const {
    const TensorView& t = params_.out;
    return static_cast<char*>(t.data) +
           (b_ * t.batch + (rules_.sequence.q_row + row) * t.row + h_ * t.head) * size_of(params_.dtype);
  }

  Acc& lse(int64_t row) const {
    const RowView& t = params_.lse;
    return static_cast<Acc*>(t.data)[b_ * t.batch + h_ * t.head + (rules_.sequence.q_row + row) * t.row];
  }

  const ForwardParams& params_;
  const ScoreRules<Acc> rules_;
  const KeyRows key_rows_;
  const int64_t b_, h_;
  Arena arena_;
  ForwardScratch<Arithmetic> x_;
};

}  // namespace
}  // namespace flash_attn::cpu
