// Puts together the tiles whose columns several CTAs shared out (TileSchedule::split_begin).
#pragma once

#include <cuda_runtime_api.h>

#include "../../params.h"
#include "tiles/schedule.h"

namespace flash_attn::cuda {

struct CombineParams {
  ForwardParams problem;
  TileSchedule schedule;
  int block_m;
  int head_dim_v;             // of the kernel: columns of partial_out
  float to_natural, to_log2;  // from the maxima in partial_statistics
};

void launch_combine(const CombineParams& params, cudaStream_t stream);

}  // namespace flash_attn::cuda
