// What turns q.k into a score: scale, softcap, attn_mask, ALiBi, window. A tile of scores is transposed,
// (key column, query row), with query rows as lanes, so that every rule below is the same for all lanes but for a few
// vectors.
#pragma once

#include "mask_effect.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

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
