// What turns q.k into a score: scale, softcap, attn_mask, ALiBi, window. A tile of scores is transposed,
// (key column, query row), with query rows as lanes, so that every rule below is the same for all lanes but for a few
// vectors.
#pragma once

#include "../packed_mask.h"
#include "../sequence.h"
#include "tile.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

template <typename T>
constexpr T kInfinity = T(__builtin_huge_val());

/// A tile of one head's scores: query rows [m_begin, m_begin + rows), key columns [n_begin, n_begin + columns).
struct Tile {
  int64_t m_begin, rows;
  int64_t n_begin, columns;
  int64_t lane_begin, lane_end;  // rows that may see a column lie in these lanes; multiples of the vector's
  bool windowed = false;         // the window takes some score away
  bool masked = false;           // attn_mask has to be added
};

/// The rules for head h of sequence b.
template <typename T>
struct ScoreRules {
  const ForwardParams& p;
  SequenceInfo sequence;
  int64_t batch_head;
  T scale, softcap, slope;
  bool has_slope;
  /// Scores are kept in units of q.k when nothing but masks follows, so that scaling is part of the exponential;
  /// otherwise `extended` scores are complete.
  bool extended;
  T exponent_scale;         // exp(score) = 2^(exponent_scale * kept score)
  const char* mask;         // of this batch and head
  mask::PackedMask packed;  // if it was read before
  int64_t b, h;

  ScoreRules(const ForwardParams& p, const SequenceInfo& sequence, int64_t b, int64_t h)
      : p(p),
        sequence(sequence),
        batch_head(b * p.num_heads + h),
        scale(T(p.softmax_scale)),
        softcap(T(p.softcap)),
        b(b),
        h(h) {
    if (p.mask.packed != nullptr) packed = mask::place_packed(p.mask, p.mask.packed);
    has_slope = p.alibi_slopes != nullptr;
    slope =
        has_slope ? static_cast<const T*>(p.alibi_slopes)[b * p.alibi_batch_stride + h * p.alibi_head_stride] : T(0);
    const bool biased = p.mask.data != nullptr && p.mask.dtype != DType::kBool;
    extended = p.softcap > 0.0 || biased || has_slope || p.sinks != nullptr || !(p.softmax_scale > 0.0);
    exponent_scale = T(extended ? kLog2E : kLog2E * p.softmax_scale);
    mask = static_cast<const char*>(p.mask.data) + (b * p.mask.batch + h * p.mask.head) * size_of(p.mask.dtype);
  }

  const char* mask_at(int64_t row, int64_t column) const {
    return mask + (row * p.mask.row + column * p.mask.col) * size_of(p.mask.dtype);
  }
};

/// A tile's scores s and what the rules need beside them: (columns, ld), rows as lanes.
template <typename T>
struct ScoreTile {
  T* s;
  T* bias;           // scratch
  T* softcap_slope;  // gets the derivative of the softcap; null: not wanted
  uint8_t* visible;  // scratch; (columns, byte_stride(ld))
  int64_t ld;
};

// attn_mask is read in blocks of kByteRows x kByteRows when it is bool: a transposition of bytes.
constexpr int kByteRows = 16;
constexpr int64_t byte_stride(int64_t ld) { return round_up(ld, kByteRows) + kByteRows; }

template <typename T, typename Storage>
FLASH_ATTN_INLINE Vec<T> load_bias(const Storage* p) {
  if constexpr (std::is_same_v<T, double> && std::is_same_v<Storage, float>) {
    return __builtin_convertvector(load_vector<typename VectorOf<float, kVectorBytes / 2>::type>(p), Vec<double>);
  } else {
    return load<T>(p);
  }
}

template <typename T, typename Storage>
FLASH_ATTN_INLINE Vec<T> load_bias_up_to(const Storage* p, int64_t count) {
  if (count >= kLanes<T>) return load_bias<T>(p);
  Storage lanes[kLanes<T>];
  copy_partial<kLanes<T>>(lanes, p, count);
  return load_bias<T>(lanes);
}

template <typename T, typename F>
FLASH_ATTN_INLINE void with_bias_storage(DType dtype, F f) {
  if constexpr (std::is_same_v<T, double>) {
    if (dtype == DType::kFloat32) return f(static_cast<const float*>(nullptr));
  }
  with_storage<T>(dtype, f);
}

template <typename T>
FLASH_ATTN_INLINE bool any_lane(IntVec<T> mask) {
  Vec<uint64_t> words = bit_cast<Vec<uint64_t>>(mask);
  uint64_t any = 0;
  for (int i = 0; i < kLanes<uint64_t>; ++i) any |= words[i];
  return any != 0;
}

/// What a mask does with the scores of a tile.
struct MaskEffect {
  bool some_stay = false, some_go = false;
  bool known() const { return some_stay && some_go; }
};

/// Looks at (outer, inner) elements of a bias.
template <typename T, typename Storage>
void scan_bias(const Storage* data, int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride,
               MaskEffect& effect) {
  for (int64_t i = 0; i < outer && !effect.known(); ++i) {
    const Storage* line = data + i * outer_stride;
    for (int64_t j = 0; j < inner && !effect.known();) {
      if (inner_stride == 1 && j + kLanes<T> <= inner) {
        const Vec<T> bias = load_bias<T>(line + j);
        effect.some_stay = effect.some_stay || any_lane<T>(bias != -kInfinity<T>);
        effect.some_go = effect.some_go || any_lane<T>(bias == -kInfinity<T>);
        j += kLanes<T>;
      } else {
        const bool goes = load_bias_up_to<T>(line + j * inner_stride, 1)[0] == -kInfinity<T>;
        effect.some_stay = effect.some_stay || !goes;
        effect.some_go = effect.some_go || goes;
        ++j;
      }
    }
  }
}

/// The same for a bool mask.
inline void scan_bool(const uint8_t* data, int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride,
                      MaskEffect& effect) {
  using Bytes = Vec<uint8_t>;
  for (int64_t i = 0; i < outer && !effect.known(); ++i) {
    const uint8_t* line = data + i * outer_stride;
    Bytes stay{}, go{};
    int64_t j = 0;
    for (; inner_stride == 1 && j + kVectorBytes <= inner; j += kVectorBytes) {
      const Bytes v = load_vector<Bytes>(line + j);
      stay |= v;
      go |= bit_cast<Bytes>(v == 0);
    }
    effect.some_stay = effect.some_stay || any_lane<float>(bit_cast<IntVec<float>>(stay));
    effect.some_go = effect.some_go || any_lane<float>(bit_cast<IntVec<float>>(go));
    for (; j < inner; ++j) {
      const bool stays = line[j * inner_stride] != 0;
      effect.some_stay = effect.some_stay || stays;
      effect.some_go = effect.some_go || !stays;
    }
  }
}

/// The same by the classes of a packed mask's cells, which may lie in the tile by a part: it is none the worse off.
template <typename T>
MaskEffect look_up_classes(const ScoreRules<T>& rules, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  const mask::PackedMask& packed = rules.packed;
  const int64_t row_cells = packed.row_step == 0 ? 1 : (m_end - 1) / mask::kCellRows + 1;
  const int64_t col_cells = packed.col_step == 0 ? 1 : (n_end - 1) / mask::kCellCols + 1;
  uint32_t classes = 0;
  for (int64_t r = packed.row_step == 0 ? 0 : m_begin / mask::kCellRows; r < row_cells; ++r) {
    for (int64_t c = packed.col_step == 0 ? 0 : n_begin / mask::kCellCols; c < col_cells; ++c) {
      classes |= uint32_t(packed.class_word(rules.b, rules.h, int(r / 8), int(c)) >> (r % 8 * 8));
    }
  }
  MaskEffect effect;
  effect.some_stay = (classes & mask::kSeen) != 0;
  effect.some_go = (classes & (mask::kHidden | mask::kBiased)) != 0;  // or are added to
  return effect;
}

/// Rows [m_begin, m_end) and columns [n_begin, n_end) of the mask.
template <typename T>
MaskEffect scan_mask(const ScoreRules<T>& rules, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  if (rules.packed.seen != nullptr) return look_up_classes<T>(rules, m_begin, m_end, n_begin, n_end);
  const MaskView& mask = rules.p.mask;
  int64_t outer = mask.row == 0 ? 1 : m_end - m_begin, outer_stride = mask.row;
  int64_t inner = mask.col == 0 ? 1 : n_end - n_begin, inner_stride = mask.col;
  if (mask.row == 1) {
    const int64_t rows = outer;
    outer = inner, outer_stride = mask.col, inner = rows, inner_stride = 1;
  }
  MaskEffect effect;
  const char* data = rules.mask_at(m_begin, n_begin);
  if (mask.dtype == DType::kBool) {
    scan_bool(reinterpret_cast<const uint8_t*>(data), outer, outer_stride, inner, inner_stride, effect);
    return effect;
  }
  effect.some_go = true;  // a bias that is nowhere -inf is added all the same
  with_bias_storage<T>(mask.dtype, [&](auto type) {
    scan_bias<T>(reinterpret_cast<decltype(type)>(data), outer, outer_stride, inner, inner_stride, effect);
  });
  return effect;
}

/// Fills in which lanes and rules a tile has. False: no score of it exists.
template <typename T>
bool plan_tile(const ScoreRules<T>& rules, Tile& tile) {
  const ForwardParams& p = rules.p;
  constexpr int W = kLanes<T>;
  const int64_t m_end = tile.m_begin + tile.rows, n_end = tile.n_begin + tile.columns;
  const Range rows = visible_rows(p, rules.sequence, tile.n_begin, n_end);
  const int64_t first = max(rows.begin, tile.m_begin), last = min(rows.end, m_end);
  if (first >= last) return false;
  tile.lane_begin = (first - tile.m_begin) / W * W;
  tile.lane_end = round_up(last - tile.m_begin, W);
  // Columns that every row of these lanes sees; both ends of a row's range grow with the row.
  const int64_t lane_row_end = min(tile.m_begin + tile.lane_end, m_end);
  const Range narrow{visible_columns(p, rules.sequence, lane_row_end - 1).begin,
                     visible_columns(p, rules.sequence, tile.m_begin + tile.lane_begin).end};
  tile.windowed = narrow.begin > tile.n_begin || narrow.end < n_end;
  if (p.mask.data == nullptr) return true;
  const MaskEffect effect = scan_mask<T>(rules, first, last, tile.n_begin, n_end);
  tile.masked = effect.some_go;
  return effect.some_stay;
}

/// attn_mask's tile as T: bias (columns, ld), rows as lanes. Lanes beyond the rows become -inf.
template <typename T, typename Storage>
void read_bias(const ScoreRules<T>& rules, const Tile& tile, const Storage*, T* bias, int64_t ld) {
  constexpr int W = kLanes<T>;
  const MaskView& mask = rules.p.mask;
  const auto* origin = reinterpret_cast<const Storage*>(rules.mask_at(tile.m_begin, tile.n_begin));
  const Vec<T> none = broadcast<T>(-kInfinity<T>), numbers = lane_numbers<T>();
  for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += W) {
    const int64_t rows = min(W, tile.rows - lane);
    const Storage* data = origin + lane * mask.row;
    if (mask.col == 1 && mask.row != 0) {
      for (int64_t n = 0; n < tile.columns; n += W) {
        Vec<T> block[W];
        for (int i = 0; i < W; ++i) {
          block[i] = i < rows ? load_bias_up_to<T>(data + i * mask.row + n, tile.columns - n) : none;
        }
        transpose<T>(block);
        for (int64_t i = 0; i < min(W, tile.columns - n); ++i) store<T>(bias + (n + i) * ld + lane, block[i]);
      }
      continue;
    }
    for (int64_t n = 0; n < tile.columns; ++n, data += mask.col) {
      Vec<T> value;
      if (mask.row == 0) {
        value = broadcast<T>(load_bias_up_to<T>(data, 1)[0]);
      } else if (mask.row == 1) {
        value = load_bias_up_to<T>(data, rows);
      } else {
        for (int i = 0; i < W; ++i) value[i] = i < rows ? load_bias_up_to<T>(data + i * mask.row, 1)[0] : T(0);
      }
      store<T>(bias + n * ld + lane, numbers < T(rows) ? value : none);
    }
  }
}

/// read_visible() of a packed mask.
template <typename T>
void read_packed(const ScoreRules<T>& rules, const Tile& tile, uint8_t* visible, int64_t stride) {
  for (int64_t n = 0; n < tile.columns; ++n) {
    uint8_t* const to = visible + n * stride;
    for (int64_t i = tile.lane_begin; i < round_up(tile.lane_end, kByteRows); ++i) {
      to[i] = i < tile.rows && rules.packed.sees(rules.b, rules.h, tile.m_begin + i, tile.n_begin + n) ? 1 : 0;
    }
  }
}

/// A bool attn_mask's tile as bytes: visible (columns, byte_stride(ld)), rows as lanes. Lanes beyond the rows are
/// visible to nobody.
template <typename T>
void read_visible(const ScoreRules<T>& rules, const Tile& tile, uint8_t* visible, int64_t stride) {
  if (rules.packed.seen != nullptr) return read_packed<T>(rules, tile, visible, stride);
  const MaskView& mask = rules.p.mask;
  const auto* origin = reinterpret_cast<const uint8_t*>(rules.mask_at(tile.m_begin, tile.n_begin));
  for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kByteRows) {
    const int64_t rows = min(kByteRows, tile.rows - lane);
    const uint8_t* data = origin + lane * mask.row;
    if (mask.col == 1 && mask.row != 0) {
      for (int64_t n = 0; n < tile.columns; n += kByteRows) {
        transpose_bytes(data + n, mask.row, rows, min(kByteRows, tile.columns - n), visible + n * stride + lane,
                        stride);
      }
      continue;
    }
    for (int64_t n = 0; n < tile.columns; ++n, data += mask.col) {
      uint8_t* to = visible + n * stride + lane;
      for (int64_t i = 0; i < kByteRows; ++i) to[i] = i < rows ? data[i * mask.row] : uint8_t(0);
    }
  }
}

/// f(score, lane, column) -> score for every vector of the tile.
template <typename T, typename F>
FLASH_ATTN_INLINE void transform(const Tile& tile, T* s, int64_t ld, F f) {
  for (int64_t n = 0; n < tile.columns; ++n) {
    T* row = s + n * ld;
    for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<T>) {
      store<T>(row + lane, f(load<T>(row + lane), lane, n));
    }
  }
}

/// s = softcap(scale * s); softcap_slope, if wanted, gets the derivative of the softcap.
template <typename T>
void apply_softcap(const ScoreRules<T>& rules, const Tile& tile, T* s, T* softcap_slope, int64_t ld) {
  const T inner = rules.scale / rules.softcap;
  transform<T>(tile, s, ld, [&](Vec<T> x, int64_t lane, int64_t n) {
    const Vec<T> t = tanh<T>(x * inner);
    if (softcap_slope != nullptr) store<T>(softcap_slope + n * ld + lane, T(1) - t * t);
    return t * rules.softcap;
  });
}

template <typename T>
FLASH_ATTN_INLINE Vec<T> alibi_distance(const ScoreRules<T>& rules, const Tile& tile, int64_t lane, int64_t n) {
  const Vec<T> x = lane_numbers<T>() + T(tile.m_begin + rules.sequence.diagonal + lane - tile.n_begin - n);
  return x < T(0) ? -x : x;
}

template <typename T>
void apply_window(const ScoreRules<T>& rules, const Tile& tile, T* s, int64_t ld) {
  const ForwardParams& p = rules.p;
  const int64_t at = tile.m_begin + rules.sequence.diagonal - tile.n_begin;
  const T low = p.window_left >= 0 ? T(at - p.window_left) : -kInfinity<T>;
  const T high = p.window_right >= 0 ? T(at + p.window_right) : kInfinity<T>;
  transform<T>(tile, s, ld, [&](Vec<T> x, int64_t lane, int64_t n) {
    const Vec<T> row = lane_numbers<T>() + T(lane);
    const Vec<T> column = broadcast<T>(T(n));
    return ((column >= row + low) & (column <= row + high)) ? x : broadcast<T>(-kInfinity<T>);
  });
}

template <typename T>
void apply_bool_mask(const ScoreRules<T>& rules, const Tile& tile, const ScoreTile<T>& t) {
  const int64_t stride = byte_stride(t.ld);
  read_visible<T>(rules, tile, t.visible, stride);
  transform<T>(tile, t.s, t.ld, [&](Vec<T> x, int64_t lane, int64_t n) {
    return load_bytes<T>(t.visible + n * stride + lane) != 0 ? x : broadcast<T>(-kInfinity<T>);
  });
}

/// s = scale * s + bias
template <typename T>
void apply_bias(const ScoreRules<T>& rules, const Tile& tile, const ScoreTile<T>& t, T scale) {
  with_bias_storage<T>(rules.p.mask.dtype, [&](auto type) { read_bias<T>(rules, tile, type, t.bias, t.ld); });
  // Not a sum alone: a NaN that is masked out must go.
  transform<T>(tile, t.s, t.ld, [&](Vec<T> x, int64_t lane, int64_t n) {
    const Vec<T> b = load<T>(t.bias + n * t.ld + lane);
    return b == -kInfinity<T> ? b : x * scale + b;
  });
}

/// Whether apply_rules changes anything in the tile.
template <typename T>
bool has_rules(const ScoreRules<T>& rules, const Tile& tile) {
  return rules.softcap > T(0) || rules.has_slope || tile.masked || tile.windowed ||
         (rules.extended && rules.scale != T(1));
}

/// From t.s = q.k to scores as ScoreRules keeps them.
template <typename T>
void apply_rules(const ScoreRules<T>& rules, const Tile& tile, const ScoreTile<T>& t) {
  // Scaling waits for the first sum, and is rounded with it.
  T scale = rules.extended ? rules.scale : T(1);
  if (rules.softcap > T(0)) {
    apply_softcap<T>(rules, tile, t.s, t.softcap_slope, t.ld);
    scale = T(1);
  }
  if (tile.masked && rules.p.mask.dtype != DType::kBool) {
    apply_bias<T>(rules, tile, t, scale);
    scale = T(1);
  }
  if (rules.has_slope) {
    transform<T>(tile, t.s, t.ld, [&](Vec<T> x, int64_t lane, int64_t n) {
      return x * scale - rules.slope * alibi_distance<T>(rules, tile, lane, n);
    });
    scale = T(1);
  }
  if (scale != T(1)) transform<T>(tile, t.s, t.ld, [&](Vec<T> x, int64_t, int64_t) { return x * scale; });
  if (tile.masked && rules.p.mask.dtype == DType::kBool) apply_bool_mask<T>(rules, tile, t);
  if (tile.windowed) apply_window<T>(rules, tile, t.s, t.ld);
}

/// Marks the columns that no row of the tile sees, by their scores. Their keys and values may hold anything, NaN too.
template <typename T>
bool find_dead_columns(const Tile& tile, const T* s, int64_t ld, uint8_t* dead) {
  bool any = false;
  for (int64_t n = 0; n < tile.columns; ++n) {
    IntVec<T> alive{};
    for (int64_t lane = tile.lane_begin; lane < tile.lane_end; lane += kLanes<T>) {
      alive |= load<T>(s + n * ld + lane) != -kInfinity<T>;
    }
    dead[n] = any_lane<T>(alive) ? 0 : 1;
    any = any || dead[n] != 0;
  }
  return any;
}

}  // namespace
}  // namespace flash_attn::cpu
