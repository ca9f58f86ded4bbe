// Which rows of V hold NaN or an infinity. What attn_mask hides has probability 0, and 0 times those is NaN: a kernel
// that has not read the mask ahead looks closer at blocks with such rows, of which there are hardly ever any.
#pragma once

#include <cuda_runtime_api.h>

#include "../../host_device.h"
#include "../../params.h"

namespace flash_attn::cuda::mask {

/// Bit r % 64 of word [(batch * heads + head) * words_per_head + r / 64]: of row r of one head of V. Of dense 16-bit
/// tensors.
struct BadRows {
  const uint64_t* words = nullptr;
  int words_per_head = 0, heads = 0;

  FLASH_ATTN_HOST_DEVICE const uint64_t* of_head(int batch, int head) const {
    return words + (int64_t{batch} * heads + head) * words_per_head;
  }
};

/// Bytes for find_bad_rows() to write.
int64_t bad_rows_bytes(const ForwardParams& params);
/// Reads V once. Its rows are aligned pieces of 16 bytes.
BadRows find_bad_rows(const ForwardParams& params, void* data, cudaStream_t stream);

}  // namespace flash_attn::cuda::mask
