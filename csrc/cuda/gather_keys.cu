// Rows of a cache, copied to follow each other. A block takes every n-th chunk of a sequence's keys or values, so that
// what is used of a capacity is shared out over all of its blocks.
#include <algorithm>

#include "common/division.h"
#include "common/launch.h"
#include "gather_keys.h"

namespace flash_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = 8;  // of a thread, on their way at once
constexpr int kChunk = kThreads * kPieces;
constexpr int64_t kMostChunks = 8;          // of a block, where all rows are used
constexpr int64_t kEnoughBlocks = 1 << 12;  // for any GPU

/// Of keys or of values.
struct Side {
  TensorView from, to;
  Divisor row_pieces;   // of a row, all heads
  Divisor head_pieces;  // of a head of it
  int64_t blocks;       // of a sequence
};

struct GatherArguments {
  KeyGather gather;
  Side sides[2];
  Divisor page;
  int64_t first_block;
};

/// Piece `piece` of row `row` of the sequence, in elements from the start of the cache.
__device__ __forceinline__ int64_t source(const GatherArguments& arguments, const Side& side, const KeyRows& rows,
                                          int64_t row, int piece, int columns) {
  int column;
  const int head = side.head_pieces.divide(piece, column);
  int64_t place = rows.entry * side.from.batch + row * side.from.row;
  if (rows.pages != nullptr) {
    int in_page;
    const int page = rows.pages[arguments.page.divide(int(row), in_page)];
    place = clamp<int64_t>(page, 0, rows.entries - 1) * side.from.batch + in_page * side.from.row;
  }
  return place + head * side.from.head + column * columns;
}

/// A piece is of kColumns columns.
template <typename Piece, int kColumns>
__global__ void __launch_bounds__(kThreads) gather_keys_kernel(const __grid_constant__ GatherArguments arguments) {
  const ForwardParams& p = arguments.gather.problem;
  const int64_t blocks = arguments.sides[0].blocks + arguments.sides[1].blocks;
  const int64_t block = arguments.first_block + blockIdx.x, b = block / blocks;
  int64_t chunk = block - b * blocks;
  const bool values = chunk >= arguments.sides[0].blocks;
  const Side& side = arguments.sides[values ? 1 : 0];
  if (values) chunk -= arguments.sides[0].blocks;
  const SequenceInfo s = cached_sequence_info(p, b);
  if (arguments.gather.lengths != nullptr && chunk == 0 && !values && threadIdx.x == 0) {
    arguments.gather.lengths[b] = int32_t(s.seqlen_k);
  }
  const Range used = gathered_rows(p, s);
  const KeyRows rows = key_rows(p.cache, b);
  const int64_t row_pieces = int64_t(side.row_pieces.value), pieces = (used.end - used.begin) * row_pieces;
  const uint16_t* const from = static_cast<const uint16_t*>(side.from.data);
  Piece* const to = static_cast<Piece*>(side.to.data) + (b * p.seqlen_k + used.begin) * row_pieces;
  for (; chunk * kChunk < pieces; chunk += side.blocks) {
    const int64_t first = chunk * kChunk, first_row = first / row_pieces;
    const int skipped = int(first - first_row * row_pieces) + int(threadIdx.x);
    const int left = int(min(pieces - first, int64_t{kChunk})) - int(threadIdx.x);
    Piece moving[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      int piece;
      const int64_t row = first_row + side.row_pieces.divide(skipped + i * kThreads, piece);
      if (i * kThreads < left) {
        moving[i] = *reinterpret_cast<const Piece*>(
            from + source(arguments, side, rows, s.k_row + used.begin + row, piece, kColumns));
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (i * kThreads < left) to[first + threadIdx.x + i * kThreads] = moving[i];
    }
  }
}

/// Whether rows are of whole pieces of `columns` columns, and aligned to them.
bool fits(const TensorView& from, int64_t head_columns, int columns) {
  return head_columns % columns == 0 && reinterpret_cast<uintptr_t>(from.data) % size_t(2 * columns) == 0 &&
         from.batch % columns == 0 && from.row % columns == 0 && from.head % columns == 0;
}

template <typename Piece, int kColumns>
void launch(const KeyGather& gather, cudaStream_t stream) {
  const ForwardParams& p = gather.problem;
  GatherArguments arguments{};
  arguments.gather = gather;
  arguments.page = Divisor(p.cache.block_table != nullptr ? p.cache.page_size : 1);
  const auto side_of = [&](const TensorView& from, const TensorView& to, int64_t columns) {
    const int64_t of_head = std::max<int64_t>(1, columns / kColumns), of_row = p.num_heads_k * of_head;
    const int64_t chunks = ceil_div(p.seqlen_k * of_row, kChunk);
    const int64_t each = std::clamp<int64_t>(p.batch * chunks / kEnoughBlocks, 1, kMostChunks);
    return Side{from, to, Divisor(of_row), Divisor(of_head), ceil_div(chunks, each)};
  };
  arguments.sides[0] = side_of(p.k, gather.k, p.head_dim);
  arguments.sides[1] = side_of(p.v, gather.v, p.head_dim_v);
  const int64_t blocks = p.batch * (arguments.sides[0].blocks + arguments.sides[1].blocks);
  launch_blocks(gather_keys_kernel<Piece, kColumns>, arguments, blocks, kThreads, 0, stream, "rows of a cache");
}

}  // namespace

void gather_keys(const KeyGather& gather, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const ForwardParams& p = gather.problem;
  constexpr int kWide = 8;  // columns of 16 bytes
  const bool wide = fits(p.k, p.head_dim, kWide) && fits(p.v, p.head_dim_v, kWide);
  (wide ? launch<uint4, kWide> : launch<uint16_t, 1>)(gather, stream);
}

}  // namespace flash_attn::cuda
