// dK and dV of a block: from registers through shared memory to where they belong, or as a part to be added up.
#pragma once

#include "loader.h"

namespace flash_attn::cuda::sm80 {

template <typename Config>
struct BackwardEpilogue : BackwardLoader<Config> {
  using Base = BackwardLoader<Config>;
  using Base::kBlockN;
  using Base::lane, Base::warp_key, Base::warp_q, Base::params, Base::p, Base::tile, Base::shared;
  using typename Base::Element, typename Base::Tile;
  static constexpr int kKeyTiles = Config::kKeyTiles;
  using Accumulators = float[kKeyTiles][Config::kColumnTiles][4];

  using Base::Base;

  /// P of dV is without it.
  SM80_DEVICE float dv_scale() const { return Config::kDrops ? tile.dropout_scale : 1.f; }

  SM80_DEVICE void store_part(float* parts, const Accumulators& acc, float scale) const {
    float* const to = parts + int64_t{tile.part} * (kBlockN * Config::kHeadDim);
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kColumnTiles; ++n) {
        const int column = 2 * (n / 2 * Config::kWarpsQ + warp_q()) + n % 2;
        store_accumulated(to + ((warp_key() / 16 + m) * (Config::kHeadDim / 8) + column) * 128, lane(), acc[m][n],
                          scale);
      }
    }
  }

  SM80_DEVICE void stage_gradient(uint32_t to, const Accumulators& acc, float scale) const {
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kColumnTiles; n += 2) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = pack<Element>(acc[m][n + i / 2][i % 2 * 2] * scale, acc[m][n + i / 2][i % 2 * 2 + 1] * scale);
        }
        store_fragment<Tile>(shared + to, warp_key() + 16 * m, n / 2 * Config::kWarpsQ + warp_q(), lane(), x);
      }
    }
  }

  SM80_DEVICE void store_gradient(uint32_t from, const TensorView& view, int64_t columns) const {
    if (view.data == nullptr) return;
    Element* const to = static_cast<Element*>(view.data) + row_offset(view, p.cu_seqlens_k != nullptr, tile.batch,
                                                                      tile.sequence.k_row + tile.n_begin, tile.head_k);
#pragma unroll 2
    for (int i = int(threadIdx.x); i < kBlockN * Tile::kChunks; i += Config::kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      if (row >= tile.stored_keys || 8 * chunk >= int(columns)) continue;
      uint4 x{0, 0, 0, 0};
      if (row < tile.keys) {
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(shared + from + Tile::offset(row, chunk)));
      }
      store_piece<Config::kExtended>(to + row * view.row + 8 * chunk, x, int(columns) - 8 * chunk, params.aligned);
    }
  }
};

}  // namespace flash_attn::cuda::sm80
