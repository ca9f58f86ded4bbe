// The end of what a CTA has of a tile.
#pragma once

#include "../stages/stages.h"
#include "cluster.h"
#include "combine.h"

namespace flash_attn::cuda::decode {

/// store(part) writes the CTA's sums: as rows of out and lse, or as its part where others have units of the tile too,
/// which are put together by whoever comes last; in a cluster when the CTA has no more blocks. All consumers call it.
template <typename C, typename Store>
FLASH_ATTN_DEVICE void finish_tile(const DecodeParams& params, const TileInfo& t, const Share& share, int* word,
                                   const FreeStages& free, const Store& store) {
  const bool clustered = in_cluster(params);
  const int owner = clustered ? 0 : share.owner(t.first_unit);
  const int last = clustered ? 0 : share.owner(t.first_unit + t.units - 1);
  RowSums part{nullptr, nullptr};
  if (clustered) {
    consumers_sync<C>();  // nobody reads the stages any more
    part = part_in_stages<C>(free.stages);
  } else if (owner != last) {
    const int64_t line = part_place(blockIdx.x, owner) * C::kBlockM;
    part = {params.partial_out + line * C::kHeadDimV, params.partial_statistics + line};
  }
  store(part);
  if (owner == last) return;  // so it is in a cluster too
  consumers_sync<C>();        // the part is written
  if (threadIdx.x == 0) *word = arrive(params, owner) == last - owner;
  consumers_sync<C>();  // it is known who is last
  if (*word == 0) return;
  combine_parts<C>(params, t, owner, last, free);
  if (threadIdx.x == 0) close_arrivals(params, owner);
}

}  // namespace flash_attn::cuda::decode
