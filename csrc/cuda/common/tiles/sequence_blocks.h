// The blocks of rows of all sequences in one list, so that a grid has about as many as there are, whatever the longest
// sequence is said to have.
#pragma once

#include "../../../sequence.h"

namespace flash_attn::cuda {

/// Where the blocks of packed sequence b, which begins at `row`, stand in the list. No other length is needed for it: a
/// sequence of n rows has n / block blocks, rounded up, and floor((row + n) / block) + 1 - floor(row / block) is no
/// less, so that they never reach into those of b + 1.
FLASH_ATTN_HOST_DEVICE int64_t first_packed_block(int64_t row, int64_t b, int block) { return row / block + b; }

/// Places in the list, and so no less than there are blocks: each sequence may end inside one.
FLASH_ATTN_HOST_DEVICE int64_t max_packed_blocks(int64_t total, int64_t batch, int block) {
  return total / block + batch;
}

/// Of the queries or of the keys of a problem. Packed sequences stand in the list as first_packed_block() says, unless
/// as many blocks for each as for the longest are fewer.
struct SequenceBlocks {
  const int32_t* starts;  // cu_seqlens, (batch + 1); null: every sequence has `longest` blocks
  int block;              // rows of one
  int64_t batch, total, longest;

  SequenceBlocks() = default;
  SequenceBlocks(const int32_t* cu_seqlens, int64_t batch, int64_t total, int64_t max_seqlen, int block)
      : block(block), batch(batch), total(total), longest(ceil_div(max_seqlen, block)) {
    const bool pays = max_packed_blocks(total, batch, block) < batch * longest;
    starts = pays ? cu_seqlens : nullptr;
  }
  static SequenceBlocks of_queries(const ForwardParams& p, int block) {
    return {p.cu_seqlens_q, p.batch, p.total_q, p.seqlen_q, block};
  }
  static SequenceBlocks of_keys(const ForwardParams& p, int block) {
    return {p.cu_seqlens_k, p.batch, p.total_k, p.seqlen_k, block};
  }

  /// Of the list; some at a sequence's end may have no rows.
  int64_t count() const { return starts != nullptr ? max_packed_blocks(total, batch, block) : batch * longest; }

  struct Place {
    int batch, index;  // the sequence, and which of its blocks; below 0 before the first sequence
  };
  /// Of number `n` in the list.
  FLASH_ATTN_HOST_DEVICE Place find(uint32_t n) const {
    if (starts == nullptr) {
      const uint32_t b = n / static_cast<uint32_t>(longest);
      return {static_cast<int>(b), static_cast<int>(n - b * static_cast<uint32_t>(longest))};
    }
    const int b = find_sequence(static_cast<int>(n));
    return {b, static_cast<int>(n) - first(b)};
  }

  struct PlaceOfHead {
    int64_t batch, head, index;
  };
  /// Of number `n` among the blocks of all heads: sequence by sequence, head by head, the last rows first if
  /// `descending`.
  FLASH_ATTN_HOST_DEVICE PlaceOfHead find_of_heads(int64_t n, int64_t num_heads, bool descending) const {
    int64_t b, in_sequence, blocks = longest;
    if (starts == nullptr) {
      b = n / (num_heads * longest);
      in_sequence = n - b * num_heads * longest;
    } else {
      const int at = find_sequence(static_cast<int>(n / num_heads));
      const int64_t begin = first(at);
      b = at;
      blocks = (at + 1 < batch ? first(at + 1) : max_packed_blocks(total, batch, block)) - begin;
      in_sequence = n - begin * num_heads;
      if (in_sequence < 0) return {b, 0, -1};  // before the first sequence
    }
    const int64_t head = in_sequence / blocks, index = in_sequence - head * blocks;
    return {b, head, descending ? blocks - 1 - index : index};
  }

 private:
  FLASH_ATTN_HOST_DEVICE int first(int b) const {
    return static_cast<int>(first_packed_block(clamp<int64_t>(starts[b], 0, total), b, block));
  }
  /// The last one that begins at n or before.
  FLASH_ATTN_HOST_DEVICE int find_sequence(int n) const {
    int low = 0, high = static_cast<int>(batch);
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (first(middle) <= n ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace flash_attn::cuda
