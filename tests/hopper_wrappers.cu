// Kernels of one instruction wrapper each, for test_hopper_wrappers.py, which compares what they write bit by bit with
// what the wrapper's comment promises. Every launch ends in a synchronisation and returns its error.
#include <cuda_runtime.h>

#include "../csrc/cuda/common/counters.h"
#include "../csrc/cuda/common/dependent_launch.h"
#include "../csrc/cuda/common/launch.h"
#include "../csrc/cuda/sm90/backward/dq/turns.h"
#include "../csrc/cuda/sm90/backward/preprocess/statistics.h"
#include "../csrc/cuda/sm90/hopper/cluster.h"
#include "../csrc/cuda/sm90/hopper/stmatrix.h"
#include "../csrc/cuda/sm90/hopper/tensor_map.h"
#include "../csrc/cuda/sm90/hopper/tma.h"
#include "../csrc/cuda/sm90/hopper/wgmma.h"

using namespace flash_attn;
using namespace flash_attn::cuda;
using namespace flash_attn::cuda::sm90;
using namespace flash_attn::cuda::sm90::backward;

namespace {

template <typename Kernel, typename... Arguments>
int launch(Kernel kernel, int grid, int threads, int shared_bytes, Arguments... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  kernel<<<grid, threads, shared_bytes>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? error : cudaDeviceSynchronize();
}

// ---- wgmma

constexpr int kDepth = 128;  // of a product: eight k-steps, two panels where k runs along the columns

/// A row-major matrix as panels of 64 columns in the 128-byte swizzle, see wgmma.h.
__device__ void store_tile(uint8_t* tile, const uint16_t* matrix, int rows, int cols) {
  for (int i = threadIdx.x; i < rows * cols; i += blockDim.x) {
    const int row = i / cols, col = i % cols, chunk = col % 64 / 8 ^ row % 8;
    uint8_t* const to = tile + col / 64 * (rows * 128) + row * 128 + chunk * 16 + col % 8 * 2;
    *reinterpret_cast<uint16_t*>(to) = matrix[i];
  }
}

/// d (64, n) = a (64, kDepth) b (kDepth, n), added to what d holds if kAccumulate. An operand whose k runs along the
/// rows is given as (kDepth, ...), one whose k runs along the columns as (..., kDepth).
template <typename Element, int kN, bool kRegisters, bool kAccumulate, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(128) wgmma_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const tile_a = shared;
  uint8_t* const tile_b = shared + 64 * kDepth * 2;
  kMajorA == kColumns ? store_tile(tile_a, a, 64, kDepth) : store_tile(tile_a, a, kDepth, 64);
  kMajorB == kColumns ? store_tile(tile_b, b, kN, kDepth) : store_tile(tile_b, b, kDepth, kN);
  async_proxy_fence();
  __syncthreads();

  using Mma = Wgmma<Element>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto place = [&](int i) {
    return (16 * warp + lane / 4 + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2;
  };
  float acc[kN / 2];
  for (int i = 0; i < kN / 2; ++i) acc[i] = d[place(i)];
  uint32_t fragment[kDepth / 16][4];
  for (int step = 0; step < kDepth / 16; ++step) {
    for (int j = 0; j < 4; ++j) {
      const int row = 16 * warp + lane / 4 + j % 2 * 8, col = 16 * step + lane % 4 * 2 + j / 2 * 8;
      fragment[step][j] = kRegisters ? a[row * kDepth + col] | a[row * kDepth + col + 1] << 16 : 0;
    }
  }
  const uint32_t a0 = kMajorA == kColumns ? descriptor(tile_a) : descriptor_across(tile_a, kDepth);
  const uint32_t b0 = kMajorB == kColumns ? descriptor(tile_b) : descriptor_across(tile_b, kDepth);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const uint32_t at_a = a0 + (kMajorA == kColumns ? k_step_along(step, 64) : k_step_across(step));
    const uint32_t at_b = b0 + (kMajorB == kColumns ? k_step_along(step, kN) : k_step_across(step));
    if constexpr (kRegisters) {
      if (step == 0) {
        Mma::template rs<kAccumulate, kMajorB>(acc, fragment[step], at_b);
      } else {
        Mma::template rs<true, kMajorB>(acc, fragment[step], at_b);
      }
    } else {
      if (step == 0) {
        Mma::template ss<kAccumulate, kMajorA, kMajorB>(acc, at_a, at_b);
      } else {
        Mma::template ss<true, kMajorA, kMajorB>(acc, at_a, at_b);
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_results(acc);
  for (int i = 0; i < kN / 2; ++i) d[place(i)] = acc[i];
}

template <typename Element, int kN>
int run_wgmma(bool registers, bool accumulate, int major_a, int major_b, const uint16_t* a, const uint16_t* b,
              float* d) {
  constexpr int kPanels = (kN + 63) / 64;  // with k along the rows the last one is used in part
  const auto run = [&](auto kernel) { return launch(kernel, 1, 128, (1 + kPanels) * 64 * kDepth * 2, a, b, d); };
  if (registers) {
    if (major_b == kColumns) return run(wgmma_kernel<Element, kN, true, true, kColumns, kColumns>);
    return accumulate ? run(wgmma_kernel<Element, kN, true, true, kColumns, kRows>)
                      : run(wgmma_kernel<Element, kN, true, false, kColumns, kRows>);
  }
  if (major_a == kRows) return run(wgmma_kernel<Element, kN, false, true, kRows, kRows>);
  if (major_b == kRows) return run(wgmma_kernel<Element, kN, false, true, kColumns, kRows>);
  return accumulate ? run(wgmma_kernel<Element, kN, false, true, kColumns, kColumns>)
                    : run(wgmma_kernel<Element, kN, false, false, kColumns, kColumns>);
}

template <typename Element>
int run_wgmma(int n, bool registers, bool accumulate, int major_a, int major_b, const uint16_t* a, const uint16_t* b,
              float* d) {
  switch (n) {
    case 64: return run_wgmma<Element, 64>(registers, accumulate, major_a, major_b, a, b, d);
    case 80: return run_wgmma<Element, 80>(registers, accumulate, major_a, major_b, a, b, d);
    case 96: return run_wgmma<Element, 96>(registers, accumulate, major_a, major_b, a, b, d);
    case 128: return run_wgmma<Element, 128>(registers, accumulate, major_a, major_b, a, b, d);
    case 192: return run_wgmma<Element, 192>(registers, accumulate, major_a, major_b, a, b, d);
    default: return run_wgmma<Element, 256>(registers, accumulate, major_a, major_b, a, b, d);
  }
}

/// out (2, kN): what one statistics step adds to every row of S and of dP, for statistics (kN, 2) of float.
template <typename Element, int kN>
__global__ void __launch_bounds__(128) statistics_kernel(const float* statistics, float* out) {
  __shared__ __align__(128) StatisticOperand weights;
  __shared__ __align__(128) uint2 rows[kN][2];
  weights.init<Element>();
  for (int i = threadIdx.x; i < 2 * kN; i += 128) rows[i / 2][i % 2] = split_statistic<Element>(statistics[i]);
  async_proxy_fence();
  __syncthreads();
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float acc[kN / 2] = {};
    wgmma_fence();
    add_statistics(Element{}, acc, which == 0 ? lse_weights_descriptor(weights) : delta_weights_descriptor(weights),
                   statistics_descriptor(rows));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_results(acc);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < kN / 2; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      out[(which * 64 + row) * kN + col] = acc[i];
    }
  }
}

// ---- the copy engine

/// A box of 64 columns to shared memory and from there, byte by byte, to `raw`; then out of shared memory to `to`.
__global__ void __launch_bounds__(128)
    box_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, Coordinates at_from,
               Coordinates at_to, int bytes, uint8_t* raw) {
  extern __shared__ __align__(1024) uint8_t box[];
  __shared__ uint64_t full;
  for (int i = threadIdx.x; i < bytes; i += 128) box[i] = 0xff;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    mbarrier_init_fence();
  }
  async_proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_prefetch_map(&from);
    mbarrier_arrive_expect(&full, bytes);
    tma_load(box, &from, &full, at_from);
  }
  mbarrier_wait(&full, 0);
  for (int i = threadIdx.x; i < bytes; i += 128) raw[i] = box[i];
  if (threadIdx.x != 0) return;
  tma_store(&to, shared_address(box), at_to);
  tma_store_commit();
  tma_store_wait();
}

TensorMapSource source_of(void* data, int64_t rows, int64_t max_rows, int64_t heads, int64_t head_dim,
                          int64_t row_stride) {
  return {{data, 0, row_stride, head_dim}, DType::kBFloat16, 1, rows, max_rows, heads, head_dim};
}

/// CTA 0 and 1 of a cluster swap 1024 bytes; then floats go from shared to global memory, stored by the copy engine,
/// and added by it and by the vector instruction.
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128)
    bulk_kernel(const float* in, float* swapped, float* sums, float* stored, float* stored_by_threads) {
  __shared__ __align__(128) float mine[256], theirs[256];
  __shared__ uint64_t loaded, received, told;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(&loaded, 1);
    mbarrier_init(&received, 1);
    mbarrier_init(&told, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(&received, sizeof(theirs));
  }
  __syncthreads();
  cluster_sync();  // the peer's barriers are ready
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&loaded, sizeof(mine));
    bulk_load(mine, in + rank * 256, sizeof(mine), &loaded);
    mbarrier_wait(&loaded, 0);
    bulk_copy_to_peer(peer_address(theirs, rank ^ 1), mine, sizeof(mine), peer_address(&received, rank ^ 1));
    bulk_store(stored + rank * 256, mine, sizeof(mine));
    bulk_reduce_add(sums, mine, sizeof(mine));
    tma_store_commit();
    tma_store_wait();
  }
  mbarrier_wait(&loaded, 0);
  const int four = 4 * (threadIdx.x % 64);
  const bool store = threadIdx.x >= 64;
  global_store_or_add(store, store ? stored_by_threads + rank * 256 + four : sums + four, mine + four);
  mbarrier_wait(&received, 0);
  for (int i = threadIdx.x; i < 256; i += 128) swapped[rank * 256 + i] = theirs[i];
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive_peer(peer_address(&told, rank ^ 1));
  mbarrier_wait(&told, 0);  // the peer has read: this CTA may end
}

// ---- barriers

/// Warp 0 hands `count` numbers to three other warps through two slots, behind full and empty barriers.
__global__ void __launch_bounds__(128) ring_kernel(int count, int* seen) {
  constexpr int kStages = 2;
  __shared__ uint64_t full[kStages], empty[kStages];
  __shared__ volatile int slot[kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], 96);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    const int stage = i % kStages;
    const uint32_t phase = i / kStages % 2;
    if (threadIdx.x >= 32) {
      mbarrier_wait(&full[stage], phase);
      seen[i * 96 + threadIdx.x - 32] = slot[stage];
      mbarrier_arrive(&empty[stage]);
    } else if (threadIdx.x == 0) {
      mbarrier_wait(&empty[stage], phase ^ 1);
      slot[stage] = 3 * i + 1;
      mbarrier_arrive(&full[stage]);
    }
  }
}

/// Round i of `votes` (rounds, 128): out (rounds, 128) is what each thread hears. Warps 2 and 3 of a second barrier
/// only arrive, so that warps 0 and 1 see what they wrote before.
__global__ void __launch_bounds__(128) vote_kernel(int rounds, const int* votes, int* heard, int* order) {
  __shared__ volatile int written[64];
  for (int i = 0; i < rounds; ++i) {
    heard[i * 128 + threadIdx.x] = named_barrier_any(1, 128, votes[i * 128 + threadIdx.x] != 0);
    if (threadIdx.x >= 64) {
      written[threadIdx.x - 64] = i + 1;
      named_barrier_arrive(2, 128);
    } else {
      named_barrier_sync(2, 128);
      order[i * 64 + threadIdx.x] = written[threadIdx.x];
    }
  }
}

/// In round i the first tile of kCtas CTAs to come writes numbers to values[i], and the others say what they see there.
template <int kCtas>
__global__ void claim_kernel(int rounds, int* states, int* values, int* seen) {
  if (threadIdx.x != 0) return;
  const int tile = blockIdx.x / kCtas, rank = blockIdx.x % kCtas;
  for (int i = 0; i < rounds; ++i) {
    int* const answer = seen + i * gridDim.x + blockIdx.x;
    int* const value = values + i * kCtas;
    if (claim_block<kCtas>(states + i, tile, rank == 0)) {
      value[rank] = 7 * i + 1;
      add_to_count(states + i);
      *answer = -1;
    } else {
      *answer = *static_cast<volatile int*>(value + kCtas - 1 - rank);
    }
  }
}

__global__ void first_kernel(int* number) {
  grid_launch_dependents();
  for (int64_t end = clock64() + 1000000; clock64() < end;) {
  }
  *number = 7;
}

struct SecondParams {
  const int* number;
  int* out;
};
__global__ void second_kernel(SecondParams params) {
  grid_dependency_wait();
  *params.out = *params.number;
}

// ---- registers

/// Thirty-two lanes write four matrices of eight rows of 16 bytes, plain and transposed, and the first two once more.
__global__ void fragment_kernel(const uint32_t* matrices, uint16_t* plain, uint16_t* transposed, uint16_t* two) {
  __shared__ __align__(128) uint16_t tile[3][4][8][8];
  const int lane = threadIdx.x;
  uint32_t m[4];
  for (int i = 0; i < 4; ++i) m[i] = matrices[i * 32 + lane];
  stmatrix_x4(shared_address(tile[0][lane / 8][lane % 8]), m[0], m[1], m[2], m[3]);
  stmatrix_x4_transposed(shared_address(tile[1][lane / 8][lane % 8]), m);
  stmatrix_x2(shared_address(tile[2][lane % 16 / 8][lane % 8]), m[0], m[1]);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) {
    plain[i] = (&tile[0][0][0][0])[i];
    transposed[i] = (&tile[1][0][0][0])[i];
    if (i < 128) two[i] = (&tile[2][0][0][0])[i];
  }
}

__global__ void arithmetic_kernel(int count, const float* x, uint32_t* bf16, uint32_t* fp16, float* exp2) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    bf16[i] = pack<__nv_bfloat16>(x[i], x[(i + 1) % count]);
    fp16[i] = pack<__half>(x[i], x[(i + 1) % count]);
    exp2[i] = fast_exp2(x[i]);
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int test_wgmma(bool bf16, int n, bool registers, bool accumulate, int major_a, int major_b, const uint16_t* a,
                      const uint16_t* b, float* d) {
  return bf16 ? run_wgmma<__nv_bfloat16>(n, registers, accumulate, major_a, major_b, a, b, d)
              : run_wgmma<__half>(n, registers, accumulate, major_a, major_b, a, b, d);
}

EXPORT int test_statistics(bool bf16, int n, const float* statistics, float* out) {
  if (n == 64) {
    return bf16 ? launch(statistics_kernel<__nv_bfloat16, 64>, 1, 128, 0, statistics, out)
                : launch(statistics_kernel<__half, 64>, 1, 128, 0, statistics, out);
  }
  return bf16 ? launch(statistics_kernel<__nv_bfloat16, 128>, 1, 128, 0, statistics, out)
              : launch(statistics_kernel<__half, 128>, 1, 128, 0, statistics, out);
}

/// `from` and `to` are (rows, heads, head_dim), bfloat16. Rows [row, row + box_rows) of a head, of a sequence that ends
/// before row `end` and whose longest has max_rows, are loaded, dumped to `raw` and stored to the same rows of `to`.
EXPORT int test_box(void* from, void* to, int rows, int heads, int head_dim, int max_rows, int box_rows, int column,
                    int row, int end, int head, uint8_t* raw) {
  const CUtensorMap map_from =
      make_tensor_map(source_of(from, rows, max_rows, heads, head_dim, heads * head_dim), box_rows);
  const CUtensorMap map_to =
      make_tensor_map(source_of(to, rows, max_rows, heads, head_dim, heads * head_dim), box_rows);
  const Coordinates at{column, max_rows - (end - row), end, head, 0};
  return launch(box_kernel, 1, 128, box_rows * 128, map_from, map_to, at, at, box_rows * 128, raw);
}

EXPORT int test_bulk(const float* in, float* swapped, float* sums, float* stored, float* stored_by_threads) {
  return launch(bulk_kernel, 2, 128, 0, in, swapped, sums, stored, stored_by_threads);
}
EXPORT int test_ring(int count, int* seen) { return launch(ring_kernel, 1, 128, 0, count, seen); }
EXPORT int test_votes(int rounds, const int* votes, int* heard, int* order) {
  return launch(vote_kernel, 1, 128, 0, rounds, votes, heard, order);
}
EXPORT int test_claims(int ctas_of_tile, int ctas, int rounds, int* states, int* values, int* seen) {
  return launch(ctas_of_tile == 1 ? claim_kernel<1> : claim_kernel<2>, ctas, 32, 0, rounds, states, values, seen);
}
EXPORT int test_dependent_launch(int* number, int* out) {
  first_kernel<<<1, 1>>>(number);
  launch_dependent(second_kernel, dim3(1), 1, 0, nullptr, SecondParams{number, out}, "second");
  return cudaDeviceSynchronize();
}
EXPORT int test_fragments(const uint32_t* matrices, uint16_t* plain, uint16_t* transposed, uint16_t* two) {
  return launch(fragment_kernel, 1, 32, 0, matrices, plain, transposed, two);
}
EXPORT int test_arithmetic(int count, const float* x, uint32_t* bf16, uint32_t* fp16, float* exp2) {
  return launch(arithmetic_kernel, 64, 256, 0, count, x, bf16, fp16, exp2);
}
