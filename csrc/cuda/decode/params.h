// What the kernel gets: the problem, how its blocks are shared out, and where parts of tiles go.
#pragma once

#include <vector_types.h>

#include "../../float8.h"
#include "../../params.h"
#include "../common/division.h"

namespace flash_attn::cuda::decode {

struct DecodeParams {
  ForwardParams problem;
  Descale k_descale, v_descale;  // of float8 caches
  Divisor group;                 // query heads that read the same keys
  Divisor page;                  // rows of one; 1 without pages
  bool whole_rows;               // head_dim and head_dim_v are the kernel's, and rows of 16 lie in one page
  bool scores_as_they_are;       // neither softcap nor ALiBi
  bool alike;                    // no length on the device: every sequence is like the first
  bool early;                    // alike, and no entries and pages: where everything is can be told before any read
  int num_heads_k;
  int stages;  // blocks of keys and values in shared memory
  // Of CTAs that are clusters: each has a part of one tile.
  int cluster;             // CTAs of one; 1: there are none
  Divisor tile_ctas;       // that have parts of a tile, in one cluster or several
  Divisor sequence_tiles;  // of all heads
  // Of CTAs that share tiles with others; see parts.h.
  uint64_t launch_id;
  uint64_t* arrivals;          // (CTAs)
  float* partial_out;          // (CTAs, 2, kBlockM, kHeadDim), relative to the row's maximum
  float2* partial_statistics;  // (CTAs, 2, kBlockM): row_max in log2, row_sum
};

}  // namespace flash_attn::cuda::decode
