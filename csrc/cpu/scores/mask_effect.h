// Whether attn_mask hides something of a tile or all of it, before any score is computed.
#pragma once

#include "score_rules.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

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

}  // namespace
}  // namespace flash_attn::cpu
