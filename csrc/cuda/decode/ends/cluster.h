// Tiles whose parts the CTAs of a cluster have: each leaves its part in its own shared memory, and puts together a
// share of the rows from the parts of all. Where several clusters have parts of a tile, CTAs of the same rank have the
// same share of its rows: each cluster leaves its sums of them in the workspace, and the last CTA puts those together.
#pragma once

#include "../../sm90/hopper/cluster.h"
#include "../stages/stages.h"
#include "output.h"

namespace flash_attn::cuda::decode {

/// Bytes of a CTA's part, in stages that are free, and how many stages it takes.
template <typename C>
constexpr int kPartBytes = C::kBlockM * (C::kHeadDimV * 4 + int(sizeof(float2)));
template <typename C>
constexpr int kStagesOfPart = (kPartBytes<C> + C::kStageBytes - 1) / C::kStageBytes + C::kMergeStages;

/// This CTA's share of a tile's rows: 128 columns of a row by a warp. sums(part, row, column) and
/// statistics(part, row) read what each of up to 32 parts has; store(row, column, statistics, o) gets all together.
template <typename C, typename Statistics, typename Sums, typename Store>
FLASH_ATTN_DEVICE void combine_share(const DecodeParams& params, const TileInfo& t, int parts,
                                     const Statistics& statistics, const Sums& sums, const Store& store) {
  constexpr int kWarps = C::kConsumers / 32, kPieces = (C::kHeadDimV + 127) / 128, kAtOnce = 4;
  uint32_t thread = threadIdx.x;
  forget_derived(thread);  // else what follows from it stands in registers while blocks are processed
  const int lane = int(thread) % 32, rank = int(sm90::cluster_rank());
#pragma unroll 1
  for (int i = int(thread) / 32 * params.cluster + rank; i < t.rows * kPieces; i += kWarps * params.cluster) {
    const int row = i / kPieces, column = i % kPieces * 128 + 4 * lane;
    const float2 part = lane < parts ? statistics(lane, row) : float2{-INFINITY, 0.f};
    float high = part.x;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
    // 0: the part has seen nothing of the row, and its O may be NaN there.
    const float weight = part.y == 0.f ? 0.f : sm80::fast_exp2(part.x - high);
    float sum = weight * part.y;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    float4 o = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int first = 0; first < parts; first += kAtOnce) {
      float4 x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j < parts && column < C::kHeadDimV) x[j] = sums(first + j, row, column);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float w = __shfl_sync(~0u, weight, first + j);
        if (w == 0.f || column >= C::kHeadDimV) continue;
        o.x += w * x[j].x, o.y += w * x[j].y, o.z += w * x[j].z, o.w += w * x[j].w;
      }
    }
    store(row, column, float2{high, sum}, o);
  }
}

/// Whether CTAs are clusters; on Hopper alone.
FLASH_ATTN_DEVICE bool in_cluster([[maybe_unused]] const DecodeParams& params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
  return params.cluster > 1;
#else
  return false;
#endif
}

/// Where a CTA of a cluster leaves its part, of all stages.
template <typename C>
FLASH_ATTN_DEVICE RowSums part_in_stages(unsigned char* stages) {
  asm volatile("" : "+l"(stages));  // else places behind it stand in registers while blocks are processed
  float* const sums = reinterpret_cast<float*>(stages + C::kMergeStages * C::kStageBytes);
  return {sums, reinterpret_cast<float2*>(sums + C::kBlockM * C::kHeadDimV)};
}

/// When this CTA's part is written. All consumers call it, and loading warps leave_cluster().
template <typename C>
FLASH_ATTN_DEVICE void combine_in_cluster(const DecodeParams& params, const TileInfo& t, int* word,
                                          unsigned char* stages) {
  const ForwardParams& p = params.problem;
  const RowSums mine = part_in_stages<C>(stages);
  sm90::cluster_sync();  // the parts are there
  const auto of_peer = [&](int peer, int row) {
    return sm90::load_peer_float2(sm90::peer_address(mine.statistics + row, uint32_t(peer)));
  };
  const auto sums_of_peer = [&](int peer, int row, int column) {
    return sm90::load_peer_float4(sm90::peer_address(mine.out + row * C::kHeadDimV + column, uint32_t(peer)));
  };
  const auto to_output = [&](int row, int column, float2 all, float4 o) {
    const OutputRow<C> output(params, t, row);
    const float factor = output.finish(params, t, all, column == 0);
    if (column < p.head_dim_v) store_out<C>(output.out(p, t) + column, o, factor);
  };
  if (int(params.tile_ctas.value) == params.cluster) {
    combine_share<C>(params, t, params.cluster, of_peer, sums_of_peer, to_output);
    return sm90::cluster_sync();  // peers have read this CTA's part
  }
  const auto place = [&](int cluster, int row) { return int64_t{cluster} * C::kBlockM + row; };
  combine_share<C>(params, t, params.cluster, of_peer, sums_of_peer, [&](int row, int column, float2 all, float4 o) {
    const int64_t line = place(sm90::cluster_id(), row);
    if (column == 0) params.partial_statistics[line] = all;
    if (column >= C::kHeadDimV) return;
    *reinterpret_cast<float4*>(params.partial_out + line * C::kHeadDimV + column) = o;
  });
  sm90::cluster_arrive();  // this CTA reads no peer any more
  consumers_sync<C>();     // the sums are written
  const int rank = int(sm90::cluster_rank()), clusters = int(params.tile_ctas.value) / params.cluster;
  const int owner = params.tile_ctas.divide(blockIdx.x) * int(params.tile_ctas.value) + rank;
  if (threadIdx.x == 0) *word = arrive(params, owner) == clusters - 1;
  consumers_sync<C>();  // it is known who is last
  if (*word != 0) {
    const int first = (owner - rank) / params.cluster;
    combine_share<C>(
        params, t, clusters,
        [&](int part, int row) { return __ldcg(params.partial_statistics + place(first + part, row)); },
        [&](int part, int row, int column) {
          const float* const from = params.partial_out + place(first + part, row) * C::kHeadDimV + column;
          return __ldcg(reinterpret_cast<const float4*>(from));
        },
        to_output);
    if (threadIdx.x == 0) close_arrivals(params, owner);
  }
  sm90::cluster_wait();
}

/// What a loading warp has to do in a cluster when all is loaded: as many barriers as combine_in_cluster().
FLASH_ATTN_DEVICE void leave_cluster() {
  sm90::cluster_sync();
  sm90::cluster_sync();
}

}  // namespace flash_attn::cuda::decode
