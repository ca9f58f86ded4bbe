// Attention of few query rows over many keys, whose time is that of reading the keys and values once.
//
// A CTA has a share of all blocks of keys (sharing/units.h). Some of its warps copy them through a ring of stages in
// shared memory (stages/loading.h), whatever tile they belong to, so that the next tile's are under way while this
// one's results are written; the others compute, on packed rows (warps/config.h): by mma.sync (warps/block.h), or on
// Hopper by a warpgroup (warpgroups/block.h). Tiles that several CTAs have a part of are put together by the last
// (sharing/parts.h).
#pragma once

#include "../common/dependent_launch.h"
#include "../sm90/hopper/budgets.h"
#include "ends/finish.h"
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
  static constexpr int kFixedBytes = (kBytes + C::kAlignment - 1) / C::kAlignment * C::kAlignment;

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
  const uint32_t stages = shared_address(memory.stages);
  Loader<C> loader(params, memory.board, first, end, (int(threadIdx.x) - C::kConsumers) / 32);
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

/// What the others do of an empty part of a tile.
template <typename C>
FLASH_ATTN_DEVICE void see_nothing(const DecodeParams& params, const Memory<C>& memory, const Unit& first) {
  if (threadIdx.x == 0) {
    memory.board.tiles[0] = tile_info<C>(params, first);
    open_arrivals(params);
  }
  const RowSums part = part_in_stages<C>(memory.stages);
  for (int row = threadIdx.x; row < C::kBlockM; row += C::kConsumers) part.statistics[row] = {-INFINITY, 0.f};
  consumers_sync<C>();
}

/// The others, a block after the other. State has what a thread knows of a tile: start() of a tile, process() of each
/// block, finish() when the CTA has no more of them. Each thread says for itself that it has read a stage.
template <typename State>
struct BlockByBlock {
  using Config = typename State::Config;

  FLASH_ATTN_DEVICE static void prepare(const Memory<Config>&) {}

  FLASH_ATTN_DEVICE static int use_stages(const DecodeParams& params, const Memory<Config>& memory, const Unit& first) {
    State state(memory.queries);
    StagePlace at;
    TileInfo begun = tile_info<Config>(params, first);  // the first tile's queries are read while its keys come
    if (params.early) grid_dependency_wait();
    if (threadIdx.x == 0) open_arrivals(params);
#pragma unroll 1
    for (;;) {
      state.start(params, begun);
      if constexpr (Config::kQueriesInShared) consumers_sync<Config>();  // the queries are there
#pragma unroll 1
      for (;;) {
        barrier_wait(memory.barriers->full + at.stage, at.parity);
        const BlockInfo block = memory.board.blocks[at.stage];
        const TileInfo& t = memory.board.tiles[block.slot];
        unsigned char* const stage = memory.stages + at.stage * Config::kStageBytes;
        state.process(params, t, stage, block.first_key, block.partial);
        uint64_t* const empty = memory.barriers->empty + at.stage;
        at.advance(params.stages);
        if (!block.ends) {
          barrier_arrive(empty);
          continue;
        }
        const FreeStages free = block.last ? FreeStages{memory.stages, params.stages} : FreeStages{stage, 1};
        state.finish(params, t, memory.scratch->share, memory.word, free, memory.statistics);
        if (block.last) return block.slot;
        barrier_arrive(empty);
        break;
      }
      barrier_wait(memory.barriers->full + at.stage, at.parity);
      begun = memory.board.tiles[memory.board.blocks[at.stage].slot];
    }
  }
};

/// Users compute: Users::use_stages(), which returns the place of the last tile on the board.
template <typename Users>
__global__ void __launch_bounds__(Users::Config::kThreads, Users::Config::kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  using C = typename Users::Config;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  if constexpr (C::kFloat8) return;  // decode.cpp refuses them
#endif
  extern __shared__ __align__(1024) unsigned char shared[];
  const Memory<C> memory(shared);
  if (threadIdx.x == 0) {
    memory.barriers->init(C::kLoaders, C::kConsumers);
    Users::prepare(memory);
  }
  grid_launch_dependents();
  // For whoever wrote the lengths, q and the cache, or still uses the workspace. Where no length, entry or page is read
  // from memory, each warp works out first what it has to do, and waits then.
  if (!params.early) grid_dependency_wait();
  Unit first;
  const Share share = find_share<C>(params, memory.scratch, first);
  if (threadIdx.x == 0) memory.scratch->share = share;
  __syncthreads();  // the barriers and the share are there
  const bool empty = share.begin >= share.end;
  if (empty && !in_cluster(params)) return;
  if (threadIdx.x >= C::kConsumers) {
    if constexpr (C::kLoaderRegisters != 0) sm90::register_budget_lower<C::kLoaderRegisters>();
    if (!empty) fill_stages<C>(params, memory, first, share.end);
    if (in_cluster(params)) leave_cluster();
  } else {
    if constexpr (C::kLoaderRegisters != 0) sm90::register_budget_raise<C::kConsumerRegisters>();
    int slot = 0;
    if (empty) {
      see_nothing(params, memory, first);
    } else {
      slot = Users::use_stages(params, memory, first);
    }
    if (in_cluster(params)) combine_in_cluster<C>(params, memory.board.tiles[slot], memory.word, memory.stages);
  }
}

}  // namespace flash_attn::cuda::decode
