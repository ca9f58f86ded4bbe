// What has to be in place before the forward kernel can share out the tiles of packed sequences; one small launch whose
// end the forward kernel's start overlaps (programmatic dependent launch).
#pragma once

#include <cuda_runtime_api.h>

#include "../../../params.h"

namespace flash_attn::cuda::sm90::forward {

/// Writes first_m_block (batch + 1), the number of query blocks of `block_m` rows in the sequences before b, and gives
/// the rows of out and lse that belong to no sequence their 0 and -inf.
void launch_prepare(const ForwardParams& params, int block_m, int* first_m_block, cudaStream_t stream);

}  // namespace flash_attn::cuda::sm90::forward
