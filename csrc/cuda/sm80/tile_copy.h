// How tiles get from global to shared memory.
#pragma once

#include "shared_tile.h"

namespace flash_attn::cuda::sm80 {

/// A piece of 16 bytes from anywhere: `columns` elements of it, and zeros.
template <typename Element>
SM80_DEVICE void store_unaligned_piece(uint32_t address, const Element* piece, int columns) {
  const uint16_t* const from = reinterpret_cast<const uint16_t*>(piece);
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t low = 2 * w < columns ? from[2 * w] : 0, high = 2 * w + 1 < columns ? from[2 * w + 1] : 0;
    words[w] = low | high << 16;
  }
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

/// How kThreads threads share out the 16-byte pieces of a tile of kRows rows: each has one chunk of each group of
/// chunks, and every kStep-th row.
template <int kRows, int kColumns, int kThreads>
struct TileCopy {
  using Tile = SharedTile<kColumns>;
  static constexpr int kPower = Tile::kChunks & -Tile::kChunks;  // the largest power of 2 that divides a row's chunks
  static constexpr int kGroup = kPower < kThreads / 8 ? kPower : kThreads / 8;
  static constexpr int kStep = kThreads / kGroup;
  static_assert(kThreads % kGroup == 0 && kRows % kStep == 0 && kStep % 8 == 0);
  // That the compiler sees of a copy of a part: where a thread has one piece of a row ptxas would order all of a
  // backward step otherwise, and slower, if it saw more; where it has several, registers are spilled if it sees less.
  static constexpr int kRowsAtOnce = Tile::kChunks > kGroup ? 4 : 1;

  /// A thread's first piece.
  SM80_DEVICE static int row(uint32_t thread) { return int(thread) / kGroup; }
  SM80_DEVICE static int chunk(uint32_t thread) { return int(thread) % kGroup; }
  SM80_DEVICE static uint32_t offset(uint32_t thread) { return Tile::offset(row(thread), chunk(thread)); }

  /// All of a tile. `to` and `from` are those of the thread's first piece, `step` the bytes from one of its rows to the
  /// next. Asynchronous: the caller commits and waits.
  SM80_DEVICE static void copy(uint32_t to, const char* from, int64_t step) {
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i, from += step) {
#pragma unroll
      for (int group = 0; group < Tile::kChunks; group += kGroup) {
        cp_async_16(to + i * kStep * Tile::kRowBytes + group * 16, from + group * 16);
      }
    }
  }

  /// The same, with zeros for columns from `left` on, counted from the thread's first piece, and for rows that do not
  /// exist: `exists(i)` tells of the i-th after the thread's first. The compiler sees kUnroll of its rows at once.
  template <int kUnroll, typename Exists>
  SM80_DEVICE static void copy_part(uint32_t to, const char* from, int64_t step, int left, const Exists& exists) {
#pragma unroll kUnroll
    for (int row = 0; row < kRows; row += kStep, from += step) {
      const bool there = exists(row);
#pragma unroll
      for (int group = 0; group < Tile::kChunks; group += kGroup) {
        cp_async_16_or_zeros(to + row * Tile::kRowBytes + group * 16, from + group * 16, there && 8 * group < left);
      }
    }
  }
};

/// Rows [0, kRows) of a tile from `source`, its row 0. Rows for which `exists` is false are not read and become zeros,
/// as columns from `columns` on do; `all_exist` spares asking. Asynchronous where 16-byte pieces are aligned
/// (`aligned`): the caller commits and waits. Else with ordinary loads and stores, seen after the next barrier.
template <int kRows, int kColumns, int kThreads, bool kMayBeUnaligned, typename Element, typename Exists>
SM80_DEVICE void load_tile(uint32_t thread, uint32_t tile, const Element* source, int64_t row_stride, int columns,
                           bool aligned, bool all_exist, const Exists& exists) {
  using Tile = SharedTile<kColumns>;
  using Copy = TileCopy<kRows, kColumns, kThreads>;
  constexpr int kGroup = Copy::kGroup, kStep = Copy::kStep;
  const int row = Copy::row(thread), chunk = Copy::chunk(thread);
  const uint32_t to = tile + Copy::offset(thread);
  const Element* from = source + row * row_stride + 8 * chunk;
  if (all_exist && columns == kColumns && (!kMayBeUnaligned || aligned)) {  // nearly always
    Copy::copy(to, reinterpret_cast<const char*>(from), kStep * row_stride * int(sizeof(Element)));
    return;
  }
  if constexpr (kMayBeUnaligned) {
    if (!aligned) {
#pragma unroll 1
      for (int step = 0; step < kRows; step += kStep, from += kStep * row_stride) {
        const int left = exists(row + step) ? columns - 8 * chunk : 0;
#pragma unroll 1
        for (int group = 0; group < Tile::kChunks; group += kGroup) {
          store_unaligned_piece(to + step * Tile::kRowBytes + group * 16, from + 8 * group, left - 8 * group);
        }
      }
      return;
    }
  }
  Copy::template copy_part<Copy::kRowsAtOnce>(to, reinterpret_cast<const char*>(from),
                                              kStep * row_stride * int(sizeof(Element)), columns - 8 * chunk,
                                              [&](int further) { return exists(row + further); });
}

}  // namespace flash_attn::cuda::sm80
