// float32 as pairs: x 2^e = high + low, both fp16, with one power of two for each 64 rows of a head (Ootomo and Yokota,
// "Recovering single precision accuracy from Tensor Cores", 2022, arXiv:2203.03341). A pair keeps 23 bits of every
// entry down to 2^-16 of the tile's largest, so three products of fp16 (low high, high low, high high) give that of
// float32.
#pragma once

#include <cuda_fp16.h>

#include "../../../sequence.h"
#include "../../common/tiles/sequence_blocks.h"

namespace flash_attn::cuda::sm80::fp32 {

constexpr int kTileRows = 64;  // that have a power of two in common; counted from the start of their sequence

/// One of q, k, v, dout: a head's rows together, so that its tiles are whole and aligned whatever the tensor's strides.
struct Planes {
  __half* data = nullptr;  // (batch, heads, rows, 2 columns): the high halves of a row, then the low ones
  float* units = nullptr;  // (batch, heads, tiles): 2^-e, what a number of the tile is to be multiplied by
  int64_t rows = 0;        // of a sequence; of packed ones, all of them
  int64_t tiles = 0;       // likewise
  int heads = 0;
  int columns = 0;  // what the tensor has is filled up with zeros

  static Planes of(int64_t batch, int64_t rows, int64_t heads, int columns, bool packed) {
    const int64_t tiles = packed ? max_packed_blocks(rows, batch, kTileRows) : ceil_div(rows, kTileRows);
    return {nullptr, nullptr, rows, tiles, int(heads), columns};
  }
  /// Of q and dout, and of k and v.
  static Planes of_queries(const ForwardParams& p, int columns) {
    return of(p.batch, p.is_varlen_q() ? p.total_q : p.seqlen_q, p.num_heads, columns, p.is_varlen_q());
  }
  static Planes of_keys(const ForwardParams& p, int columns) {
    return of(p.batch, p.is_varlen_k() ? p.total_k : p.seqlen_k, p.num_heads_k, columns, p.is_varlen_k());
  }
  /// With cu_seqlens `batches` is 1.
  int64_t data_bytes(int64_t batches) const { return batches * heads * rows * 2 * columns * int64_t{sizeof(__half)}; }
  int64_t unit_bytes(int64_t batches) const { return batches * heads * tiles * int64_t{sizeof(float)}; }

  /// Of the first row of sequence `batch`, which is row `first_row` of packed ones (`packed`).
  FLASH_ATTN_HOST_DEVICE __half* head_data(bool packed, int batch, int64_t first_row, int head) const {
    return data + ((packed ? 0 : int64_t{batch} * heads) + head) * rows * (2 * columns) + first_row * (2 * columns);
  }
  FLASH_ATTN_HOST_DEVICE float* head_units(bool packed, int batch, int64_t first_row, int head) const {
    return units + ((packed ? 0 : int64_t{batch} * heads) + head) * tiles +
           (packed ? first_packed_block(first_row, batch, kTileRows) : 0);
  }
};

}  // namespace flash_attn::cuda::sm80::fp32
