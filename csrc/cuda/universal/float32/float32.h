// Kernels for float32 with larger tiles than the family's others: 8 x 8 sums a thread, operands by cp.async. They take
// rows of whole 16 bytes, of more than 16 columns, from compute capability 8.0 on.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "../../../kernel.h"

namespace flash_attn::cuda::universal::float32 {

/// Query rows and key rows of a tile.
struct TileSize {
  int queries, keys;
};
constexpr TileSize kForwardTile{128, 128}, kBackwardTile{64, 128};

bool takes(const ForwardParams& params);
bool takes(const BackwardParams& params);

/// Columns of out, or of each gradient, that a block computes: 64 or 128.
inline int block_columns(const ForwardParams& p) { return p.head_dim_v <= 64 ? 64 : 128; }
inline int block_columns(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const bool all_rules = p.softcap > 0.0 || p.dropout_p > 0.0;  // of which 128 columns take too many registers
  return all_rules || std::max(p.head_dim, p.head_dim_v) <= 64 ? 64 : 128;
}

/// By these kernels what they take, by the others what they don't. `flags` as in ../forward_launch.h.
void forward(const ForwardParams& params, const int* flags, cudaStream_t stream);
void backward(const BackwardParams& params, const int* flags, cudaStream_t stream);

}  // namespace flash_attn::cuda::universal::float32
