// The blocks of packed sequences, counted one sequence after the other.
#pragma once

#include "../../../sequence.h"

namespace flash_attn::cuda {

/// By one CTA of kThreads: `visit(b, first, count, all)` for every sequence: the blocks of `block` rows that those
/// before it have, that it has of its `rows(b)`, and that all have. Returns the last to every thread. Every thread
/// counts a run of sequences, then the runs are summed up.
template <int kThreads, typename Rows, typename Visit>
__device__ int count_blocks(int64_t num_sequences, int block, Rows rows, Visit visit) {
  __shared__ int before[kThreads];
  const int batch = static_cast<int>(num_sequences), run = (batch + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * run, batch), end = min(begin + run, batch);
  const auto blocks = [&](int b) { return static_cast<int>((rows(b) + block - 1) / block); };
  int count = 0;
  for (int b = begin; b < end; ++b) count += blocks(b);
  before[threadIdx.x] = count;
  __syncthreads();
  for (int distance = 1; distance < kThreads; distance *= 2) {
    const int left = threadIdx.x >= distance ? before[threadIdx.x - distance] : 0;
    __syncthreads();
    before[threadIdx.x] += left;
    __syncthreads();
  }
  const int all = before[kThreads - 1];
  int first = before[threadIdx.x] - count;
  for (int b = begin; b < end; ++b) {
    const int n = blocks(b);
    visit(b, first, n, all);
    first += n;
  }
  return all;
}

}  // namespace flash_attn::cuda
