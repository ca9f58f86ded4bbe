// ForwardBlock: rows that several warps have, each with other keys of S and other columns of O.
#pragma once

#include "block.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
template <typename OfQuad, typename OfTwo>
SM80_DEVICE void ForwardBlock<Config>::combine_rows(typename Softmax::RowValues& x, const OfQuad& of_quad,
                                                    const OfTwo& of_two) const {
  const uint32_t of_row = q_tile() + Config::kRowValues + 4 * (warp_row() + lane / 4);
  const auto at = [&](int w, int m, int r) { return of_row + 4 * (w * kBlockM + 16 * m + 8 * r); };
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[m][r] = of_quad(x[m][r]);
      if (lane % 4 == 0) {
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(at(warp % kWarpsD, m, r)), "f"(x[m][r]) : "memory");
      }
    }
  }
  asm volatile("bar.sync %0, %1;" ::"r"(1 + warp / kWarpsD), "n"(32 * kWarpsD) : "memory");  // all have stored theirs
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int w = 1; w < kWarpsD; ++w) {
        float y;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(y) : "r"(at((warp + w) % kWarpsD, m, r)) : "memory");
        x[m][r] = of_two(x[m][r], y);
      }
    }
  }
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::multiply_shared_p(uint32_t v_slot) {
  const uint32_t p_rows = address_by_rows<PTile>(q_tile() + Config::kP, warp_row(), lane);
  const uint32_t v = v_slot + Tile::offset(lane % 16, chunk(0) + lane / 16);
#pragma unroll
  for (int k = 0; k < kBlockN / 16; ++k) {
    uint32_t a[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) ldmatrix_x4(a[m], PTile::along(p_rows, k) + m * 16 * PTile::kRowBytes);
    multiply_step<Element, Config::kHeadDim, kWarpsD>(o, a, v + k * 16 * Tile::kRowBytes);
  }
}

template <typename Config>
SM80_DEVICE void ForwardBlock<Config>::store_probabilities() const {
#pragma unroll
  for (int k = 0; k < kNTiles / 2; ++k) {
    uint32_t a[kMTiles][4];
    pack_probabilities(k, a);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      store_fragment<PTile>(q_tile() + Config::kP, warp_row() + 16 * m, warp_key() / 16 + k, lane, a[m]);
    }
  }
}

}  // namespace flash_attn::cuda::sm80
