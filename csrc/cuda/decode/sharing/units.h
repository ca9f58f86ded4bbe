// How work is shared out. A unit is one block of keys for one tile; the units of all tiles stand in one list, sequence
// by sequence, head by head, tile by tile, and each CTA has as many of them, one after the other: however long the
// sequences are, all CTAs read about as much. A tile whose units belong to several CTAs is put together by parts.h.
#pragma once

#include "../../../sequence.h"
#include "../../common/ptx.h"
#include "../params.h"

namespace flash_attn::cuda::decode {

FLASH_ATTN_DEVICE void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

/// A sequence as its tiles see it, in 32 bits. Blocks of keys are aligned to rows of the cache, not to the first key.
struct Sequence {
  int q_row, seqlen_q, rows_q;  // rows_q: also those that take no part, which are written as 0
  int k_row, seqlen_k;          // key 0 is row k_row of the cache
  int diagonal;                 // as in SequenceInfo
  int first_block, blocks;      // that some query sees; one at least, for who writes the rows that see nothing
  int tiles;                    // of one head; 0: there are no queries
  FLASH_ATTN_DEVICE int units(int heads) const { return blocks * tiles * heads; }
};

template <typename C>
FLASH_ATTN_DEVICE Sequence sequence_of(const DecodeParams& params, int b) {
  const ForwardParams& p = params.problem;
  const SequenceInfo info = cached_sequence_info(p, b);
  Range seen{0, 0};
  if (info.seqlen_q > 0) seen = visible_columns(p, info, 0, info.seqlen_q);
  Sequence s;
  s.q_row = int(info.q_row), s.seqlen_q = int(info.seqlen_q), s.rows_q = int(info.seqlen_q_padded);
  s.k_row = int(info.k_row), s.seqlen_k = int(info.seqlen_k), s.diagonal = int(info.diagonal);
  s.first_block = int(seen.begin + info.k_row) / C::kBlockN;
  const int end = seen.empty() ? 0 : int(seen.end + info.k_row + C::kBlockN - 1) / C::kBlockN;
  s.blocks = end > s.first_block ? end - s.first_block : 1;
  s.tiles = int((info.seqlen_q_padded * params.group.value + C::kBlockM - 1) / C::kBlockM);
  return s;
}

/// Where a unit of the list stands: in which sequence, in which of its tiles, and which block it is of that tile.
struct Unit {
  int index, b, tile, block;  // tile: head * tiles + number
  Sequence sequence;

  /// To the next one before `end`; true: it is in another tile.
  template <typename C>
  FLASH_ATTN_DEVICE bool advance(const DecodeParams& params, int end) {
    ++index;
    if (++block < sequence.blocks || index >= end) return false;
    block = 0;
    if (++tile < sequence.tiles * params.num_heads_k) return true;
    tile = 0;
    do {
      sequence = sequence_of<C>(params, ++b);
    } while (sequence.tiles == 0);
    return true;
  }
};

/// The units of this CTA, and those of all: the first `more` CTAs have one more than `each`.
struct Share {
  int begin, end, each, more;

  /// Whose unit it is.
  FLASH_ATTN_DEVICE int owner(int unit) const {
    const int of_longer = more * (each + 1);
    return unit < of_longer ? unit / (each + 1) : more + (unit - of_longer) / each;
  }
};

FLASH_ATTN_DEVICE Share share_of(const DecodeParams& params, int total) {
  const int ctas = max(1, min(int(gridDim.x), total)), cta = blockIdx.x;
  Share share;
  share.each = total / ctas;
  share.more = total - share.each * ctas;
  share.begin = cta * share.each + min(cta, share.more);
  share.end = cta < ctas ? share.begin + share.each + (cta < share.more ? 1 : 0) : share.begin;
  return share;
}

/// Of clusters: this CTA's part of its tile, which may be empty; units are those of the tile.
template <typename C>
FLASH_ATTN_DEVICE Share part_of_tile(const DecodeParams& params, Unit& first) {
  int part, more;
  const int tile = params.tile_ctas.divide(blockIdx.x, part);
  first.b = params.sequence_tiles.divide(tile, first.tile);
  first.sequence = sequence_of<C>(params, first.b);
  const int each = params.tile_ctas.divide(first.sequence.blocks, more);
  first.index = first.block = part * each + min(part, more);
  return {first.index, first.index + each + (part < more ? 1 : 0), 1, 0};
}

/// What find_share needs of shared memory.
struct ShareScratch {
  int sums[16];  // of the warps
  Unit first;
  Share share;  // for who ends a tile: until then nobody keeps it in registers
};

/// This CTA's share and the first unit of it. All threads call it.
template <typename C>
FLASH_ATTN_DEVICE Share find_share(const DecodeParams& params, ShareScratch* scratch, Unit& first) {
  const int batch = int(params.problem.batch), heads = params.num_heads_k;
  if (params.cluster > 1) return part_of_tile<C>(params, first);
  if (params.alike) {
    first.sequence = sequence_of<C>(params, 0);
    const int units = first.sequence.units(heads);
    const Share share = share_of(params, units * batch);
    first.index = share.begin;
    first.b = share.begin / units;
    const int rest = share.begin % units;
    first.tile = rest / first.sequence.blocks;
    first.block = rest % first.sequence.blocks;
    return share;
  }
  // Thread i has sequences [i * each, (i + 1) * each): it counts their units, and who has the share's first finds it.
  static_assert(C::kThreads / 32 <= 16);
  const int each = (batch + C::kThreads - 1) / C::kThreads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int b_begin = min(int(threadIdx.x) * each, batch), b_end = min(b_begin + each, batch);
  int before = 0, own = 0, b = b_begin;
  Sequence s;
  Share share;
  bool found = false;
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    int units = 0;
    if (turn == 0 || (found && each > 1)) {
#pragma unroll 1
      for (b = b_begin; b < b_end; ++b) {
        s = sequence_of<C>(params, b);
        units = s.units(heads);
        if (turn > 0 && share.begin < before + units) break;
        (turn == 0 ? own : before) += units;
      }
    }
    if (turn > 0) break;
    int until = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, until, step);
      if (lane >= step) until += other;
    }
    if (lane == 31) scratch->sums[warp] = until;
    __syncthreads();  // the warps' sums are there
    int total = 0;
    before = until - own;
#pragma unroll
    for (int w = 0; w < C::kThreads / 32; ++w) {
      if (w < warp) before += scratch->sums[w];
      total += scratch->sums[w];
    }
    share = share_of(params, total);
    found = share.begin >= before && share.begin < before + own;
    if (each == 1) b = b_begin;
  }
  if (found) {
    const int in_sequence = share.begin - before, tile = in_sequence / s.blocks;
    scratch->first = {share.begin, b, tile, in_sequence - tile * s.blocks, s};
  }
  __syncthreads();  // what was found is there
  first = scratch->first;
  return share;
}

}  // namespace flash_attn::cuda::decode
