#include "../common/launch.h"
#include "bad_rows.h"
#include "bad_values.h"

namespace flash_attn::cuda::mask {
namespace {

constexpr int kThreads = 256, kRowsOfWord = 64;

struct Arguments {
  TensorView v;
  uint32_t exponent;        // see bad_values.h
  int rows, heads, pieces;  // pieces of 16 bytes in a row
  int words_per_head;
  int64_t num_words;
  uint64_t* words;
};

/// A warp makes a word: kLanes neighbouring lanes read a row, a piece each.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) bad_rows_kernel(const __grid_constant__ Arguments a) {
  constexpr int kRows = 32 / kLanes, kSteps = kRowsOfWord / kRows, kUnrolled = kSteps < 8 ? kSteps : 8;
  const int lane = threadIdx.x % 32;
  const int64_t word = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (word >= a.num_words) return;
  const int64_t slice = word / a.words_per_head;
  const int first_row = int(word - slice * a.words_per_head) * kRowsOfWord + lane / kLanes;
  const uint16_t* const from = static_cast<const uint16_t*>(a.v.data) + slice / a.heads * a.v.batch +
                               slice % a.heads * a.v.head + lane % kLanes * 8;
  uint64_t bad = 0;
#pragma unroll 1
  for (int step = 0; step < kSteps; step += kUnrolled) {
    uint4 x[kUnrolled];
#pragma unroll
    for (int i = 0; i < kUnrolled; ++i) {
      const int row = first_row + (step + i) * kRows;
      x[i] = row < a.rows && lane % kLanes < a.pieces ? __ldg(reinterpret_cast<const uint4*>(from + row * a.v.row))
                                                      : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kUnrolled; ++i) {
      const uint32_t found = __ballot_sync(~0u, is_bad(x[i].x, a.exponent) || is_bad(x[i].y, a.exponent) ||
                                                    is_bad(x[i].z, a.exponent) || is_bad(x[i].w, a.exponent));
      if (found == 0) continue;
      for (int row = 0; row < kRows; ++row) {
        constexpr uint32_t kOfRow = kLanes == 32 ? ~0u : (1u << kLanes % 32) - 1;
        if ((found >> (row * kLanes) & kOfRow) != 0) bad |= uint64_t{1} << ((step + i) * kRows + row);
      }
    }
  }
  if (lane == 0) a.words[word] = bad;
}

template <int kLanes>
void launch(const Arguments& arguments, cudaStream_t stream) {
  const int64_t blocks = (arguments.num_words * 32 + kThreads - 1) / kThreads;
  bad_rows_kernel<kLanes><<<static_cast<unsigned int>(blocks), kThreads, 0, stream>>>(arguments);
  check(cudaGetLastError(), "bad rows");
}

int words_per_head(const ForwardParams& p) { return int((p.seqlen_k + kRowsOfWord - 1) / kRowsOfWord); }

}  // namespace

int64_t bad_rows_bytes(const ForwardParams& p) { return p.batch * p.num_heads_k * words_per_head(p) * 8; }

BadRows find_bad_rows(const ForwardParams& p, void* data, cudaStream_t stream) {
  Arguments a{};
  a.v = p.v;
  a.exponent = p.dtype == DType::kBFloat16 ? kBadExponentBf16 : kBadExponentFp16;
  a.rows = int(p.seqlen_k);
  a.heads = int(p.num_heads_k);
  a.pieces = int(p.head_dim_v / 8);
  a.words_per_head = words_per_head(p);
  a.num_words = p.batch * p.num_heads_k * a.words_per_head;
  a.words = static_cast<uint64_t*>(data);
  if (a.pieces <= 8) {
    launch<8>(a, stream);
  } else if (a.pieces <= 16) {
    launch<16>(a, stream);
  } else {
    launch<32>(a, stream);
  }
  return {a.words, a.words_per_head, a.heads};
}

}  // namespace flash_attn::cuda::mask
