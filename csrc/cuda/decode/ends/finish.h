// The end of what a CTA has of a tile.
#pragma once

#include "../stages/stages.h"
#include "combine.h"

namespace flash_attn::cuda::decode {

/// store(part) writes the CTA's sums: as rows of out and lse, or as its part where others have units of the tile too,
/// which are put together by whoever comes last. All consumers call it.
template <typename C, typename Store>
FLASH_ATTN_DEVICE void finish_tile(const DecodeParams& params, const TileInfo& t, const Share& share, int* word,
                                   const FreeStages& free, const Store& store) {
  const int owner = share.owner(t.first_unit);
  const int last = share.owner(t.first_unit + t.units - 1);
  RowSums part{nullptr, nullptr};
  if (owner != last) {
    const int64_t line = part_place(blockIdx.x, owner) * C::kBlockM;
    part = {params.partial_out + line * C::kHeadDimV, params.partial_statistics + line};
  }
  store(part);
  if (owner == last) return;
  consumers_sync<C>();  // the part is written
  if (threadIdx.x == 0) *word = arrive(params, owner) == last - owner;
  consumers_sync<C>();  // it is known who is last
  if (*word == 0) return;
  combine_parts<C>(params, t, owner, last, free);
  if (threadIdx.x == 0) close_arrivals(params, owner);
}

}  // namespace flash_attn::cuda::decode
