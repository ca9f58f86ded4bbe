// Sizes of tiles and who owns what in them.
//
// Every kernel of the family multiplies square tiles, kBlock x kBlock scores, in two forms:
//   scores     S (kBlock, kBlock) += A (kBlock, kWidth) B^T,  B (kBlock, kWidth)
//   products   O (kBlock, kHeadDim) += P (kBlock, kBlock) V,  V (kBlock, kWidth) a slice of kHeadDim at a time
// with operands in shared memory, converted to the type of accumulation, and results in registers. The head dimension
// is walked in chunks of kWidth; results wider than kHeadDim are shared out to several blocks, each of which computes
// the scores anew.
//
// The 128 threads form 8 x 16. Thread (ty, tx) owns rows ty + 8 i of both results, columns tx + 16 j of S, and columns
// (16 g + tx) * kOutVec + u of a slice of O: so a row belongs to 16 lanes of one warp, and reading 16 bytes from rows
// padded by 16 bytes meets no bank conflict.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../sequence.h"

namespace flash_attn::cuda::universal {

constexpr int kThreads = 128;
constexpr int kThreadCols = 16;
constexpr int kThreadRows = kThreads / kThreadCols;

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

template <typename T, int kHeadDim_, bool kExtended_, bool kCached_ = false>
struct Config {
  using Element = T;
  using Acc = typename AccumulatorOf<T>::type;
  static constexpr int kHeadDim = kHeadDim_;     // columns of the result that a block holds
  static constexpr bool kExtended = kExtended_;  // attn_mask, ALiBi, softcap or dropout
  static constexpr bool kCached = kCached_;      // k and v lie in a cache
  static constexpr int kBlock = sizeof(Acc) == 8 ? 32 : 64;
  static constexpr int kWidth = kHeadDim < 64 ? kHeadDim : 64;
  static constexpr int kSlices = kHeadDim / kWidth;
  static constexpr int kVec = 16 / sizeof(Acc);
  static constexpr int kOutVec = kVec < kWidth / kThreadCols ? kVec : kWidth / kThreadCols;
  static constexpr int kRows = kBlock / kThreadRows;
  static constexpr int kCols = kBlock / kThreadCols;
  static constexpr int kOutCols = kWidth / kThreadCols;
  static constexpr int kLd = kWidth + kVec;   // row of an operand tile
  static constexpr int kLdP = kBlock + kVec;  // row of a score tile
  static_assert(kHeadDim % kWidth == 0 && kWidth % kThreadCols == 0 && kOutCols % kOutVec == 0);
};

template <typename C>
struct SharedStorage {
  using Acc = typename C::Acc;
  static constexpr int kTile = C::kBlock * C::kLd;
  static constexpr int kScores = C::kBlock * (C::kLd > C::kLdP ? C::kLd : C::kLdP);
  alignas(16) Acc resident[kTile];                        // rows that the block owns
  alignas(16) Acc scores[kScores];                        // an operand of the scores, then attn_mask, then P or dS
  alignas(16) Acc streamed[kTile];                        // rows that pass by
  Acc lse[C::kBlock], lost[C::kBlock], delta[C::kBlock];  // backward: of the tile's queries
  uint8_t keep[C::kBlock * C::kBlock / 4];                // dropout: (query, key / 4), a bit each key
  uint8_t alive[2][C::kBlock];  // attn_mask: streamed rows that some row of the block sees, either half
  int64_t places[2][C::kCached ? C::kBlock : 1];  // pages: where the tile's rows of k and v lie
};
static_assert(sizeof(SharedStorage<Config<float, 64, true>>) <= 64 << 10, "a block of sm_75 has 64 KB");
static_assert(sizeof(SharedStorage<Config<double, 64, true>>) <= 64 << 10, "a block of sm_75 has 64 KB");

template <typename C>
__device__ __forceinline__ SharedStorage<C>& shared_storage() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<SharedStorage<C>*>(bytes);
}

__device__ __forceinline__ int thread_row() { return int(threadIdx.x) / kThreadCols; }
__device__ __forceinline__ int thread_col() { return int(threadIdx.x) % kThreadCols; }

}  // namespace flash_attn::cuda::universal
