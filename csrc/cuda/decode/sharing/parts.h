// Tiles that several CTAs have units of. Each leaves its part in the workspace, and the one that comes last puts all of
// them together. A CTA has two places for parts: 0 of a tile that it goes on with, 1 of one that it begins and leaves.
//
// Arrivals at a tile are counted by the CTA that begins it, which has one such tile at most. The workspace is undefined
// when the kernel starts, and a launch of its own to clear it costs 2 us: so each CTA opens its counter by storing the
// launch's id with a count of 0, and an arrival that finds another id has come too early, is lost, and comes again. The
// last one closes the counter, so that a graph can be replayed with the same id.
#pragma once

#include "units.h"

namespace flash_attn::cuda::decode {

constexpr uint64_t kCountMask = 0xffff;

FLASH_ATTN_DEVICE uint64_t id_of(const DecodeParams& params) { return params.launch_id & ~kCountMask; }

FLASH_ATTN_DEVICE void open_arrivals(const DecodeParams& params) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(params.arrivals + blockIdx.x), "l"(id_of(params))
               : "memory");
}

FLASH_ATTN_DEVICE uint64_t count_arrival(uint64_t* counter) {
  uint64_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], 1;" : "=l"(before) : "l"(counter) : "memory");
  return before;
}

/// How many have arrived before at the tile that CTA `owner` begins. What the calling thread has seen written is
/// visible to those who arrive later.
FLASH_ATTN_DEVICE int arrive(const DecodeParams& params, int owner) {
  uint64_t* const counter = params.arrivals + owner;
  uint64_t before = count_arrival(counter);
  while ((before & ~kCountMask) != id_of(params)) {
    uint64_t found;
    do {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(counter) : "memory");
    } while ((found & ~kCountMask) != id_of(params));
    before = count_arrival(counter);
  }
  return int(before & kCountMask);
}

FLASH_ATTN_DEVICE void close_arrivals(const DecodeParams& params, int owner) { params.arrivals[owner] = 0; }

/// The place of a CTA's part of the tile that `owner` begins.
FLASH_ATTN_DEVICE int64_t part_place(int cta, int owner) { return 2 * int64_t{cta} + (cta == owner ? 1 : 0); }

}  // namespace flash_attn::cuda::decode
