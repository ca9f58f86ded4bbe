// ForwardBlock: what is done to a tile's scores between the products, see ../../rules.h.
#pragma once

#include "../block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::draw_kept(int col) {
  if constexpr (kDropout) {
    kept.draw(tile.dropout, tile.batch * p.num_heads + tile.head, tile.m_begin + warp_row(), col, lane);
  }
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::load_mask(int col) {
  if constexpr (kMask) {
    mask_bits.load(params.packed, tile.batch, tile.head, tile.m_begin + warp_row(), col);
  }
  if constexpr (kExtended) {
    if (p.mask.data == nullptr) return;
    const int row = tile.m_begin + warp_row();
    is_biased =
        __any_sync(~0u, adds_values<Config::kWarpRows, kSubN>(p.mask, params.packed, tile.batch, tile.head, row, col));
    if (!is_biased) {
      mask_bits.load(params.packed, tile.batch, tile.head, row, col);
    } else {
      bias.load(p.mask, tile.batch, tile.head, place(col), int(tile.sequence.seqlen_q), tile.col_end,
                params.mask_pairs);
    }
  }
}

template <typename Config>
SM80_DEVICE bool ForwardBlock<Config>::apply_rules(int col) {
  const FragmentPlace at = place(col);
  if constexpr (kExtended) {
    ScoreRules(p, tile.sequence, tile.batch, tile.head).apply(s, at);
    if (p.mask.data != nullptr) {
      if (is_biased) {
        bias.add(s, p.mask.dtype);
      } else {
        mask_bits.apply(s);
      }
    }
  }
  bool hides = true;
  if constexpr (kBias) hides = add_bias();
  if constexpr (kMask) {
    mask_bits.apply(s);
  } else if (col < full_begin() || col + kSubN > full_end()) {
    mask_columns(s, at, ColumnBounds(p, tile.sequence));
  }
  return hides;
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::drop(int col) {
  if constexpr (kExtended) {
    if (!(p.dropout_p > 0.0)) return;
    apply_dropout(s, make_dropout(p.rng_state, p.dropout_p), tile.batch * p.num_heads + tile.head, place(col));
  }
}

}  // namespace flash_attn::cuda::sm80
