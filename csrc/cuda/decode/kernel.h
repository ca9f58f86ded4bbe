// Attention of few query rows over many keys, whose time is that of reading the keys and values once.
//
// A CTA has a share of all blocks of keys (units.h). Two of its warps copy them, one keys and one values, through a
// ring of stages in shared memory (loading.h), whatever tile they belong to, so that the next tile's are under way
// while this one's results are written; the others compute, with mma.sync on packed rows (config.h). Tiles that several
// CTAs have a part of are put together by the last (parts.h).
#pragma once

#include "../common/dependent_launch.h"
#include "output.h"
#include "stages/loading.h"

namespace flash_attn::cuda::decode {

/// Shared memory: the stages, and beside them.
template <typename C>
struct Memory {
  unsigned char* queries;
  float2* statistics;  // (kWarpsN, kBlockM): see Merge
  StageBarriers* barriers;
  Board board;
  ShareScratch* scratch;
  int* word;  // who is last
  unsigned char* stages;

  static constexpr int kBytes =
      C::kQueryBytes + C::kStatisticsBytes + int(sizeof(StageBarriers)) + Board::kBytes + int(sizeof(ShareScratch)) + 4;
  static constexpr int kFixedBytes = (kBytes + 127) / 128 * 128;

  FLASH_ATTN_DEVICE explicit Memory(unsigned char* memory)
      : queries(memory),
        statistics(reinterpret_cast<float2*>(memory + C::kQueryBytes)),
        barriers(reinterpret_cast<StageBarriers*>(memory + C::kQueryBytes + C::kStatisticsBytes)),
        stages(memory + kFixedBytes) {
    board.tiles = reinterpret_cast<TileInfo*>(barriers + 1);
    board.blocks = reinterpret_cast<BlockInfo*>(board.tiles + Board::kTiles);
    scratch = reinterpret_cast<ShareScratch*>(board.blocks + Board::kStages);
    word = reinterpret_cast<int*>(scratch + 1);
  }
};

/// A loading warp: the blocks of the share, into one stage after the other.
template <typename C>
FLASH_ATTN_DEVICE void fill_stages(const DecodeParams& params, const Memory<C>& memory, const Unit& first, int end) {
  const uint32_t stages = sm80::shared_address(memory.stages);
  Loader<C> loader(params, memory.board, first, end, threadIdx.x >= C::kConsumers + 32);
  if (params.early) {
    loader.prefetch_blocks();
    grid_dependency_wait();
  }
#pragma unroll 1
  for (StagePlace at; loader.more(); at.advance(params.stages)) {
    barrier_wait(memory.barriers->empty + at.stage, at.parity ^ 1);
    loader.load(at.stage, stages + at.stage * C::kStageBytes);
    barrier_arrive_after_copies(memory.barriers->full + at.stage);
    if (loader.speaks()) barrier_arrive(memory.barriers->full + at.stage);
  }
}

/// The others.
template <typename C>
FLASH_ATTN_DEVICE void use_stages(const DecodeParams& params, const Memory<C>& memory, const Unit& first,
                                  const Share& share) {
  const uint32_t stages = sm80::shared_address(memory.stages);
  const WarpPlace<C> place;
  WarpState<C> state(memory.queries, place);
  StagePlace at;
  const auto release = [&](int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(memory.barriers->empty + stage);
  };
  TileInfo begun = tile_info<C>(params, first);  // the first tile's queries are read while its keys are under way
  if (params.early) grid_dependency_wait();
  if (threadIdx.x == 0) open_arrivals(params);
#pragma unroll 1
  for (int left = share.end - share.begin;;) {
    state.start(params, begun, place);
    if constexpr (C::kQueriesInShared) consumers_sync<C>();  // the queries are there
#pragma unroll 1
    for (;;) {
      barrier_wait(memory.barriers->full + at.stage, at.parity);
      const BlockInfo block = memory.board.blocks[at.stage];
      const TileInfo& t = memory.board.tiles[block.slot];
      state.process(params, t, stages + at.stage * C::kStageBytes, block.first_key, block.partial, place);
      const int stage = at.stage;
      at.advance(params.stages);
      --left;
      if (!block.ends) {
        release(stage);
        continue;
      }
      const Merge<C> merge{reinterpret_cast<float*>(memory.stages + stage * C::kStageBytes), memory.statistics};
      finish_tile(params, t, share, state, place, merge, memory.word);
      release(stage);
      break;
    }
    if (left == 0) return;
    barrier_wait(memory.barriers->full + at.stage, at.parity);
    begun = memory.board.tiles[memory.board.blocks[at.stage].slot];
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  if constexpr (C::kFloat8) return;  // decode.cpp refuses them
#endif
  extern __shared__ __align__(128) unsigned char shared[];
  const Memory<C> memory(shared);
  if (threadIdx.x == 0) memory.barriers->init(C::kConsumers / 32);
  grid_launch_dependents();
  // For whoever wrote the lengths, q and the cache, or still uses the workspace. Where no length, entry or page is read
  // from memory, each warp works out first what it has to do, and waits then.
  if (!params.early) grid_dependency_wait();
  Unit first;
  const Share share = find_share<C>(params, memory.scratch, first);
  __syncthreads();  // the barriers are there
  if (share.begin >= share.end) return;
  if (threadIdx.x >= C::kConsumers) {
    fill_stages<C>(params, memory, first, share.end);
  } else {
    use_stages<C>(params, memory, first, share);
  }
}

}  // namespace flash_attn::cuda::decode
