// Operands pass through shared memory in slabs, by cp.async through a ring of stages. While one is worked on, those of
// the kStages - 1 next ones are on their way, whatever phase or tile they belong to. Nothing is resident: what a block
// needs again comes from L2 again, where 64 multiply-adds and more stand against each element. So kernels for 128
// columns fit into the 99 KB of every GPU since 8.6.
#pragma once

#include "../../common/ptx.h"
#include "../../sm80/mma.h"
#include "../tile.h"
#include "products.h"

namespace flash_attn::cuda::universal::float32 {

FLASH_ATTN_DEVICE int num_slabs(int elements, int of_slab) { return (elements + of_slab - 1) / of_slab; }

/// Rows of one head of one sequence in global memory, aligned to 16 bytes.
struct Rows {
  const float* data;
  int stride, columns;
};

inline bool has_whole_chunks(const TensorView& view, int64_t columns) {
  return is_quad_aligned(view, columns, sizeof(float)) && view.row >= 0 && view.row <= INT32_MAX;
}
/// Whether rows can be counted in 32 bits.
inline bool counts_fit(const ForwardParams& p) { return p.seqlen_q < 1 << 30 && p.seqlen_k < 1 << 30; }

FLASH_ATTN_DEVICE Rows rows_of(const TensorView& view, int64_t b, int64_t row, int64_t head, int64_t columns) {
  return {static_cast<const float*>(view.data) + b * view.batch + row * view.row + head * view.head, int(view.row),
          int(columns)};
}

FLASH_ATTN_DEVICE void copy_word(uint32_t to, const float* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(exists ? 4 : 0) : "memory");
}
FLASH_ATTN_DEVICE void copy_word(uint32_t to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

/// Of a slab (kCount rows, kSlabWidth columns) that is loaded, all exist.
template <int kCount, int kSlabWidth>
FLASH_ATTN_DEVICE bool is_whole(const Rows& from, int column, const RowRange& rows) {
  return rows.begin <= 0 && rows.end >= kCount && column + kSlabWidth <= from.columns;
}

/// to (kCount, kSlabWidth) = rows [row, row + kCount), columns [column, column + kSlabWidth) of `from`. What does not
/// exist becomes 0, and is not read.
template <int kCount, int kSlabWidth>
FLASH_ATTN_DEVICE void load_slab(float* to, Rows from, int row, int column, RowRange rows) {
  constexpr int kChunks = kSlabWidth / 4, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kCount % kStep == 0);
  const int r = int(threadIdx.x) / kChunks, c = int(threadIdx.x) % kChunks * 4;
  const float* source = from.data + int64_t{row + r} * from.stride + column + c;
  const uint32_t place = shared_address(to + r * kSlabWidth + c);
  constexpr int kStepBytes = kStep * kSlabWidth * int(sizeof(float));
  if (is_whole<kCount, kSlabWidth>(from, column, rows)) {
#pragma unroll
    for (int i = 0; i < kCount / kStep; ++i) {
      sm80::cp_async_16(place + i * kStepBytes, source + int64_t{i * kStep} * from.stride);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kCount / kStep; ++i) {
    sm80::cp_async_16_or_zeros(place + i * kStepBytes, source + int64_t{i * kStep} * from.stride,
                               rows.holds(r + i * kStep) && column + c < from.columns);
  }
}

/// to (kSlabWidth, kCount), rows kToLd apart: the same transposed. 32 neighbouring lanes copy 4 rows x 8 columns, which
/// meets no bank conflict if kToLd is 4 more than a multiple of 32.
template <int kCount, int kSlabWidth, int kToLd>
FLASH_ATTN_DEVICE void load_transposed(float* to, Rows from, int row, int column, RowRange rows) {
  constexpr int kStep = kThreads / 8;
  static_assert(kToLd % 32 == 4 && kCount % kStep == 0 && kSlabWidth % 8 == 0);
  const int r = int(threadIdx.x) / 8, c = int(threadIdx.x) % 8;
  const float* source = from.data + int64_t{row + r} * from.stride + column + c;
  const uint32_t place = shared_address(to + c * kToLd + r);
  constexpr int kWord = int(sizeof(float));
  if (is_whole<kCount, kSlabWidth>(from, column, rows)) {
#pragma unroll
    for (int i = 0; i < kCount / kStep; ++i) {
#pragma unroll
      for (int j = 0; j < kSlabWidth; j += 8) {
        copy_word(place + (j * kToLd + i * kStep) * kWord, source + int64_t{i * kStep} * from.stride + j);
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kCount / kStep; ++i) {
#pragma unroll 1
    for (int j = 0; j < kSlabWidth; j += 8) {
      copy_word(place + (j * kToLd + i * kStep) * kWord, source + int64_t{i * kStep} * from.stride + j,
                rows.holds(r + i * kStep) && column + c + j < from.columns);
    }
  }
}

/// Slabs in the order in which they are worked on. `issue(stage)` starts the loads of the next one that has none yet.
template <int kStages, int kStageSize>
struct Ring {
  float* stages;  // (kStages, kStageSize)
  int stage = 0;  // to be worked on next

  template <typename Issue>
  FLASH_ATTN_DEVICE void start(const Issue& issue) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      issue(stages + i * kStageSize);
      sm80::cp_async_commit();
    }
  }

  /// The next slab; all that was stored before is there as well.
  template <typename Issue>
  FLASH_ATTN_DEVICE float* next(const Issue& issue) {
    sm80::cp_async_wait<kStages - 2>();
    __syncthreads();  // the slab is there, and all are done with the one before it, into whose stage one is loaded now
    issue(stages + (stage == 0 ? kStages - 1 : stage - 1) * kStageSize);
    sm80::cp_async_commit();
    float* const slab = stages + stage * kStageSize;
    stage = stage == kStages - 1 ? 0 : stage + 1;
    return slab;
  }
};

}  // namespace flash_attn::cuda::universal::float32
