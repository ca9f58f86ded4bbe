// Forward pass. A task is a block of query rows of one head. It goes over the keys in tiles with the online softmax
// (Milakov and Gimelshein 2018; Dao et al. 2022), everything transposed: S = K Q^T (columns, rows), O^T += V^T P, so
// that query rows are lanes, row maxima and sums need no reduction across lanes, and k and v are read as they lie.
#include "isa.h"
#include "parallel.h"
#include "scores.h"

namespace flash_attn::cpu::FLASH_ATTN_ISA {
namespace {

template <typename Arithmetic>
struct ForwardScratch {
  using Acc = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  int64_t ldm, ldk, ldv;            // leading dimensions: block rows, operands of head_dim, head_dim_v
  Operand* q_t;                     // (head_dim / pack, ldm)
  Operand* k;                       // (kForwardBlockN, ldk)
  Operand* v;                       // (kForwardBlockN / pack, ldv)
  Acc* s;                           // (kForwardBlockN, ldm): scores, then probabilities
  Operand* p;                       // (kForwardBlockN / pack, ldm): probabilities as operands
  Acc* extra;                       // (kForwardBlockN, ldm): mask or dropout
  Acc* out_t;                       // (head_dim_v, ldm)
  Acc *row_max, *row_sum, *factor;  // (ldm)
  uint8_t* dead;                    // (kForwardBlockN)

  ForwardScratch(const ForwardParams& params, Arena& arena) {
    constexpr int W = kLanes<Acc>;
    ldm = max(W, min(kForwardBlockM, round_up(params.seqlen_q, W)));
    ldk = round_up((params.head_dim + Arithmetic::kPack - 1) / Arithmetic::kPack, kPadding<Acc>);
    ldv = round_up(params.head_dim_v, kPadding<Acc>);
    q_t = arena.take<Operand>(ldk * ldm);
    k = arena.take<Operand>(kForwardBlockN * ldk);
    v = arena.take<Operand>(kForwardBlockN / Arithmetic::kPack * ldv);
    s = arena.take<Acc>(kForwardBlockN * ldm);
    p = Arithmetic::kPack == 1 ? reinterpret_cast<Operand*>(s) : arena.take<Operand>(kForwardBlockN / 2 * ldm);
    extra = params.mask.data != nullptr || params.dropout_p > 0.0 ? arena.take<Acc>(kForwardBlockN * ldm) : nullptr;
    out_t = arena.take<Acc>(ldv * ldm);
    row_max = arena.take<Acc>(ldm);
    row_sum = arena.take<Acc>(ldm);
    factor = arena.take<Acc>(ldm);
    dead = arena.take<uint8_t>(kForwardBlockN);
  }
};

/// Scores become probabilities relative to the new row maxima; `rescale` is what older sums are to be multiplied by.
/// False: by 1, all of them.
template <typename T>
bool online_softmax(const Tile& tile, T* s, int64_t ld, T exponent_scale, T* row_max, T* row_sum, T* rescale) {
  constexpr int W = kLanes<T>;
  IntVec<T> changed{};
  for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += W) {
    const Vec<T> old_max = load<T>(row_max + lane);
    Vec<T> partial_max[4] = {old_max, old_max, old_max, old_max};
    T* column = s + lane;
    int64_t n = 0;
    for (; n + 4 <= tile.columns; n += 4) {
      for (int i = 0; i < 4; ++i) partial_max[i] = max<T>(load<T>(column + (n + i) * ld), partial_max[i]);
    }
    for (; n < tile.columns; ++n) partial_max[0] = max<T>(load<T>(column + n * ld), partial_max[0]);
    const Vec<T> new_max = max<T>(max<T>(partial_max[0], partial_max[1]), max<T>(partial_max[2], partial_max[3]));
    const Vec<T> shift = new_max == -kInfinity<T> ? Vec<T>{} : new_max;  // -inf - -inf would be NaN
    const Vec<T> alpha = exp2<T>(old_max - shift, exponent_scale);
    Vec<T> sum[2] = {};
    for (n = 0; n < tile.columns; ++n) {
      const Vec<T> probability = exp2<T>(load<T>(column + n * ld) - shift, exponent_scale);
      store<T>(column + n * ld, probability);
      sum[n % 2] += probability;
    }
    store<T>(row_max + lane, new_max);
    store<T>(row_sum + lane, load<T>(row_sum + lane) * alpha + (sum[0] + sum[1]));
    store<T>(rescale + lane, alpha);
    changed |= alpha != T(1);
  }
  return any_lane<T>(changed);
}

/// Probabilities (columns, ld) as operands of a sum over columns.
template <typename Arithmetic>
void pack_probabilities(const Tile& tile, const typename Arithmetic::Acc* s, typename Arithmetic::Operand* p,
                        int64_t ld) {
  if constexpr (Arithmetic::kPack == 2) {
    for (int64_t n = 0; n < tile.columns; n += 2) {
      for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<float>) {
        const Words even = round_to_bfloat16(load<float>(s + n * ld + lane));
        const Words odd = n + 1 < tile.columns ? round_to_bfloat16(load<float>(s + (n + 1) * ld + lane)) : Words{};
        store_vector(p + n / 2 * ld + lane, even | (odd << 16));
      }
    }
  }
}

template <typename Arithmetic>
class ForwardBlock {
 public:
  using Acc = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;

  ForwardBlock(const ForwardParams& params, const SequenceInfo& sequence, int64_t b, int64_t h, void* scratch)
      : params_(params), rules_(params, sequence, b, h), b_(b), h_(h), arena_(scratch), x_(params, arena_) {}

  void run(int64_t m_begin) {
    const SequenceInfo& sequence = rules_.sequence;
    const int64_t rows = max(0, min(x_.ldm, sequence.seqlen_q - m_begin));
    if (rows > 0) {
      start(m_begin, rows);
      const Range columns = visible_columns(params_, sequence, m_begin, m_begin + rows);
      for (int64_t n = max(columns.begin, 0); n < columns.end; n += kForwardBlockN) {
        Tile tile{m_begin, rows, n, min(kForwardBlockN, columns.end - n), 0, 0};
        if (plan_tile<Acc>(rules_, tile)) process_tile(tile);
      }
      finish(m_begin, rows);
    }
    clear(m_begin + rows, min(m_begin + x_.ldm, sequence.seqlen_q_padded));
  }

 private:
  Rows rows_of(const TensorView& t, int64_t head, int64_t row, int64_t count, int64_t columns) const {
    const char* data =
        static_cast<const char*>(t.data) + (b_ * t.batch + row * t.row + head * t.head) * size_of(params_.dtype);
    return {data, params_.dtype, t.row, count, columns};
  }

  void start(int64_t m_begin, int64_t rows) {
    pack_transposed<Arithmetic>(rows_of(params_.q, h_, rules_.sequence.q_row + m_begin, rows, params_.head_dim),
                                round_up(rows, kLanes<Acc>), x_.q_t, x_.ldm);
    // A sink is a key without a value: a score the row has seen before any other.
    const Acc* sinks = static_cast<const Acc*>(params_.sinks);
    const Acc first_max = sinks != nullptr ? sinks[h_] : -kInfinity<Acc>;
    for (int64_t lane = 0; lane < x_.ldm; ++lane) {
      x_.row_max[lane] = first_max;
      x_.row_sum[lane] = first_max > -kInfinity<Acc> || first_max != first_max ? Acc(1) : Acc(0);
    }
    std::memset(x_.out_t, 0, size_t(x_.ldv * x_.ldm) * sizeof(Acc));
  }

  void process_tile(const Tile& tile) {
    const int64_t k_head = h_ / params_.group_size(), k_row = rules_.sequence.k_row + tile.n_begin;
    const int64_t lane = tile.lane_begin, lanes = tile.lane_end - tile.lane_begin, ldm = x_.ldm;
    pack_rows<Arithmetic>(rows_of(params_.k, k_head, k_row, tile.columns, params_.head_dim),
                          round_up(tile.columns, kGemmRows), x_.k, x_.ldk);
    pack_across<Arithmetic>(rows_of(params_.v, k_head, k_row, tile.columns, params_.head_dim_v),
                            round_up(tile.columns, Arithmetic::kPack), x_.v, x_.ldv);
    const int64_t depth = (params_.head_dim + Arithmetic::kPack - 1) / Arithmetic::kPack;
    gemm<Arithmetic, Layout::kRowMajor>(tile.columns, lanes, depth, x_.k, x_.ldk, x_.q_t + lane, ldm, x_.s + lane, ldm,
                                        false);
    apply_rules<Acc>(rules_, tile, x_.s, x_.extra, nullptr, ldm);
    if (tile.masked && find_dead_columns<Acc>(tile, x_.s, ldm, x_.dead)) {
      for (int64_t n = 0; n < tile.columns; ++n) {
        if (x_.dead[n] != 0) clear_row_across<Arithmetic>(x_.v, x_.ldv, n);
      }
    }
    if (online_softmax<Acc>(tile, x_.s, ldm, rules_.exponent_scale, x_.row_max, x_.row_sum, x_.factor)) {
      rescale_out(tile);
    }
    if (params_.dropout_p > 0.0) {
      draw_dropout<Acc>(rules_, tile, x_.extra, ldm);
      transform<Acc>(tile, x_.s, ldm, [&](Vec<Acc> p, int64_t lane, int64_t n) {
        return load<Acc>(x_.extra + n * ldm + lane) == Acc(0) ? Vec<Acc>{} : p;
      });
    }
    pack_probabilities<Arithmetic>(tile, x_.s, x_.p, ldm);
    gemm<Arithmetic, Layout::kDepthMajor>(params_.head_dim_v, lanes,
                                          (tile.columns + Arithmetic::kPack - 1) / Arithmetic::kPack, x_.v, x_.ldv,
                                          x_.p + lane, ldm, x_.out_t + lane, ldm, true);
  }

  void rescale_out(const Tile& tile) {
    for (int64_t c = 0; c < params_.head_dim_v; ++c) {
      Acc* row = x_.out_t + c * x_.ldm;
      for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<Acc>) {
        store<Acc>(row + lane, load<Acc>(row + lane) * load<Acc>(x_.factor + lane));
      }
    }
  }

  void finish(int64_t m_begin, int64_t rows) {
    const Acc keep_scale =
        params_.dropout_p > 0.0 ? Acc(make_dropout(params_.rng_state, params_.dropout_p).scale) : Acc(1);
    const double unit = rules_.extended ? 1.0 : params_.softmax_scale;
    for (int64_t lane = 0; lane < x_.ldm; ++lane) {
      const Acc sum = x_.row_sum[lane];
      x_.factor[lane] = sum == Acc(0) ? Acc(0) : keep_scale / sum;
    }
    for (int64_t lane = 0; lane < rows; ++lane) {
      const double sum = double(x_.row_sum[lane]);
      lse(m_begin + lane) = sum == 0.0 ? -kInfinity<Acc> : Acc(double(x_.row_max[lane]) * unit + __builtin_log(sum));
    }
    store_transposed<Acc>(x_.out_t, x_.ldm, rows, params_.head_dim_v, x_.factor, out_row(m_begin), params_.dtype,
                          params_.out.row);
  }

  void clear(int64_t begin, int64_t end) {
    if (begin >= end) return;
    clear_rows(out_row(begin), params_.dtype, end - begin, params_.head_dim_v, params_.out.row);
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
  const int64_t b_, h_;
  Arena arena_;
  const ForwardScratch<Arithmetic> x_;
};

/// Task `index` is (sequence, head, block of rows). The last block comes first: under a causal mask it is the heaviest.
template <typename Arithmetic>
void forward_task(const void* context, int64_t index, void* scratch) {
  const ForwardParams& params = *static_cast<const ForwardParams*>(context);
  Arena none(nullptr);
  const int64_t block = ForwardScratch<Arithmetic>(params, none).ldm;
  const int64_t blocks = (params.seqlen_q + block - 1) / block;
  const int64_t m_block = blocks - 1 - index % blocks, h = index / blocks % params.num_heads,
                b = index / blocks / params.num_heads;
  const SequenceInfo sequence = sequence_info(params, b);
  if (m_block * block >= sequence.seqlen_q_padded) return;
  ForwardBlock<Arithmetic>(params, sequence, b, h, scratch).run(m_block * block);
}

/// Rows of the packed tensors that belong to no sequence.
template <typename Acc>
void clear_unused_rows(const ForwardParams& p) {
  if (p.cu_seqlens_q == nullptr) return;
  for (int64_t b = 0; b <= p.batch; ++b) {
    int64_t begin = 0;
    if (b > 0) {
      const SequenceInfo before = sequence_info(p, b - 1);
      begin = before.q_row + before.seqlen_q_padded;
    }
    const int64_t end = b < p.batch ? sequence_info(p, b).q_row : p.total_q;
    for (int64_t h = 0; h < p.num_heads && begin < end; ++h) {
      void* out = static_cast<char*>(p.out.data) + (begin * p.out.row + h * p.out.head) * size_of(p.dtype);
      clear_rows(out, p.dtype, end - begin, p.head_dim_v, p.out.row);
      for (int64_t row = begin; row < end; ++row) {
        static_cast<Acc*>(p.lse.data)[h * p.lse.head + row * p.lse.row] = -kInfinity<Acc>;
      }
    }
  }
}

template <typename Arithmetic>
void run(const ForwardParams& params) {
  clear_unused_rows<typename Arithmetic::Acc>(params);
  Arena size(nullptr);
  const int64_t block = ForwardScratch<Arithmetic>(params, size).ldm;
  const int64_t tasks = params.batch * params.num_heads * ((params.seqlen_q + block - 1) / block);
  run_tasks(tasks, size.used(), forward_task<Arithmetic>, &params);
}

}  // namespace

void run_forward(const ForwardParams& params) {
#if defined(__AVX512BF16__)
  if (params.dtype == DType::kBFloat16) return run<BFloat16Pairs>(params);
#else
  if (params.dtype == DType::kFloat64) return run<Plain<double> >(params);
  run<Plain<float> >(params);
#endif
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
