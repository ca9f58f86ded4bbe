// Tiles of pairs on their way to shared memory, and float32 results on theirs to global memory.
#pragma once

#include "../shared_tile.h"

namespace flash_attn::cuda::sm80::fp32 {

// Bytes between a chunk and the one that is a multiple of eight further on.
template <int kColumns>
SM80_DEVICE constexpr int bytes_of_chunks(SharedTile<kColumns>, int chunks) {
  return chunks * 16;
}

/// Rows [0, kRows) of a tile from planes, whose rows follow each other; those for which `exists` is false become zeros.
/// The caller commits and waits. A thread has one chunk of each group of chunks, and every kStep-th row. Rows have the
/// columns of the tile, of which the first kLoaded are loaded.
template <typename Tile, int kRows, int kLoaded, int kThreads, typename Exists>
SM80_DEVICE void load_rows(uint32_t tile, const __half* source, uint32_t thread, bool all_exist, const Exists& exists) {
  constexpr int kColumns = 8 * Tile::kChunks, kChunks = kLoaded / 8;
  constexpr int kPower = kChunks & -kChunks;  // the largest power of 2 that divides a row's chunks
  constexpr int kWidest = kThreads > 64 ? kThreads / 8 : 8;
  constexpr int kGroup = kPower < kWidest ? kPower : kWidest;
  constexpr int kStep = kThreads / kGroup;
  static_assert(kThreads % kGroup == 0 && kRows % kStep == 0 && (kStep % 8 == 0 || kStep == 4));
  const int row = int(thread / kGroup), chunk = int(thread % kGroup);
  // Chunks change places from row to row, all eight rows alike.
  const uint32_t even = tile + Tile::offset(row, chunk);
  const uint32_t odd = kStep == 4 ? tile + Tile::offset(row + 4, chunk) - 4 * Tile::kRowBytes : even;
  const auto place = [=](int step) { return (step / kStep % 2 == 0 ? even : odd) + step * Tile::kRowBytes; };
  const __half* const from = source + row * kColumns + 8 * chunk;
  if (all_exist) {
#pragma unroll
    for (int step = 0; step < kRows; step += kStep) {
#pragma unroll
      for (int group = 0; group < kChunks; group += kGroup) {
        cp_async_16(place(step) + bytes_of_chunks(Tile(), group), from + step * kColumns + 8 * group);
      }
    }
    return;
  }
#pragma unroll 1
  for (int step = 0; step < kRows; step += kStep) {
    const bool inside = exists(row + step);
#pragma unroll(kStep == 4 ? kChunks / kGroup : 1)  // one warp alone has few registers
    for (int group = 0; group < kChunks; group += kGroup) {
      cp_async_16_or_zeros(place(step) + bytes_of_chunks(Tile(), group),
                           inside ? from + step * kColumns + 8 * group : source, inside);
    }
  }
}

/// Two neighbours in global memory, of which `columns` exist.
SM80_DEVICE void store_two(float* to, float x, float y, int columns, bool pairs) {
  if (pairs && columns > 1) {
    *reinterpret_cast<float2*>(to) = {x, y};
    return;
  }
  if (columns > 0) to[0] = x;
  if (columns > 1) to[1] = y;
}

}  // namespace flash_attn::cuda::sm80::fp32
