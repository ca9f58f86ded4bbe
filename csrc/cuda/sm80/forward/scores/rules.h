// ForwardBlock: what is done to a tile's scores between the products, see ../../rules.h.
#pragma once

#include "../block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::draw_kept(int col) {
  if constexpr (kDropout) {
    const FragmentPlace at = place(col);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      kept[m].draw(tile.dropout, tile.batch * p.num_heads + tile.head, {at.row + 16 * m, at.col});
    }
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
SM80_DEVICE void ForwardBlock<Config>::apply_rules(int col) {
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
  if constexpr (kBias) add_bias();
  if constexpr (kMask) {
    mask_bits.apply(s);
  } else if (col < full_begin() || col + kSubN > full_end()) {
    mask_columns(s, at, ColumnBounds(p, tile.sequence));
  }
}

/// As many columns of fragments as both have.
template <int kMTiles, int kTo, int kFrom>
SM80_DEVICE void copy_fragments(float (&to)[kMTiles][kTo][4], const float (&from)[kMTiles][kFrom][4]) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < kTo && n < kFrom; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[m][n][i] = from[m][n][i];
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::drop(int col) {
  if constexpr (kExtended) {
    if (!(p.dropout_p > 0.0)) return;
    const Dropout dropout = make_dropout(p.rng_state, p.dropout_p);
    const int64_t batch_head = tile.batch * p.num_heads + tile.head;
    if constexpr (kNTiles % 4 == 0) {
      apply_dropout(s, dropout, batch_head, place(col));
    } else {  // a quad's lanes draw four fragments at a time, of which there are two
      static_assert(kNTiles == 2);
      float four[kMTiles][4][4] = {};
      copy_fragments(four, s);
      apply_dropout(four, dropout, batch_head, place(col));
      copy_fragments(s, four);
    }
  }
}

}  // namespace flash_attn::cuda::sm80
