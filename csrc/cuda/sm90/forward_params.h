// What the host hands to the forward kernel.
#pragma once

#include <cuda.h>

#include "tile_schedule.h"

namespace flash_attn::sm90 {

struct ForwardKernelParams {
  CUtensorMap q, k, v, out;  // see tensor_map.h
  ForwardParams problem;
  TileSchedule schedule;
  float scale_log2;      // softmax_scale / ln 2
  int panels, panels_v;  // of 64 columns that q and k, and v and out have
  uint64_t launch_id;    // no other launch's, see open_counter()
};

}  // namespace flash_attn::sm90
