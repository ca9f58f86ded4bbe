// How the forward pass is cut into tasks: each a few blocks of query rows of one head. When there are few, the keys of
// each are shared out in parts, whose results are put together in order.
#pragma once

#include "task.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

constexpr int64_t kForwardTasks = 32;                   // as many as there should be at least, for any processor
constexpr int64_t kTasksPerThread = 8;                  // or for those threads that there are
constexpr int64_t kRowBlockBytes = int64_t(512) << 10;  // what a task's row blocks may take of the second-level cache
constexpr int64_t kPartColumns = 512;                   // of a part of a task at least

template <typename T>
int64_t all_blocks(const ForwardParams& params) {
  const int64_t ldm = rows_of_block<T>(params);
  return params.batch * params.num_heads * ((params.seqlen_q + ldm - 1) / ldm);
}

/// Row blocks of a task: the more, the more often a tile of keys and values is used that was packed once. Results are
/// the same with any number.
template <typename T>
int64_t row_blocks_of_task(const ForwardParams& params) {
  const int64_t ldm = rows_of_block<T>(params), blocks = (params.seqlen_q + ldm - 1) / ldm, all = all_blocks<T>(params);
  if (all < kForwardTasks) return 1;
  const int64_t columns = round_up(params.head_dim, kPadding<T>) + round_up(params.head_dim_v, kPadding<T>);
  const int64_t fit = kRowBlockBytes / max(1, columns * ldm * int64_t(sizeof(T)));
  return max(1, min(min(all / min(kForwardTasks, kTasksPerThread * num_threads()), fit), min(kMaxRowBlocks, blocks)));
}

/// Task `index` is (sequence, head, run of row blocks). The last rows come first: under a causal
/// mask they are the heaviest.
template <typename Arithmetic>
struct ForwardContext {
  using Acc = typename Arithmetic::Acc;
  const ForwardParams& params;
  int64_t row_blocks, runs, tasks, scratch_bytes;
  // Of a task, by the shapes alone: the number of threads must not change the result.
  int64_t parts, part_columns;
  int64_t partial_size;     // of (2 + head_dim_v, ldm): row_max, row_sum, out_t
  Acc* partials = nullptr;  // (tasks, parts, partial_size)

  explicit ForwardContext(const ForwardParams& params) : params(params) {
    Arena size(nullptr);
    row_blocks = row_blocks_of_task<Acc>(params);
    const ForwardScratch<Arithmetic> scratch(params, row_blocks, size);
    runs = (params.seqlen_q + row_blocks * scratch.ldm - 1) / (row_blocks * scratch.ldm);
    tasks = params.batch * params.num_heads * runs;
    scratch_bytes = size.used();
    const int64_t all = max(1, all_blocks<Acc>(params));
    parts = max(1, min((kForwardTasks + all - 1) / all, params.seqlen_k / kPartColumns));
    part_columns = round_up((params.seqlen_k + parts - 1) / parts, kForwardBlockN);
    partial_size = (2 + params.head_dim_v) * scratch.ldm;
  }

  int64_t first_block(int64_t task) const { return (runs - 1 - task % runs) * row_blocks; }
};

template <typename Arithmetic>
ForwardTask<Arithmetic> task_of(const ForwardContext<Arithmetic>& c, int64_t index, void* scratch) {
  const int64_t head = index / c.runs, b = head / c.params.num_heads, h = head % c.params.num_heads;
  return ForwardTask<Arithmetic>(c.params, cached_sequence_info(c.params, b), b, h, c.row_blocks, scratch);
}

template <typename Arithmetic>
void forward_task(const void* context, int64_t index, void* scratch) {
  const auto& c = *static_cast<const ForwardContext<Arithmetic>*>(context);
  const MatrixUnit unit;
  const FlushToZero flush;
  task_of(c, index, scratch).run(c.first_block(index));
}

/// Index is (task, part).
template <typename Arithmetic>
void forward_part(const void* context, int64_t index, void* scratch) {
  const auto& c = *static_cast<const ForwardContext<Arithmetic>*>(context);
  const MatrixUnit unit;
  const FlushToZero flush;
  const int64_t task = index / c.parts, begin = index % c.parts * c.part_columns;
  task_of(c, task, scratch)
      .run_part(c.first_block(task), {begin, begin + c.part_columns}, c.partials + index * c.partial_size);
}

template <typename Arithmetic>
void combine_parts(const void* context, int64_t index, void* scratch) {
  const auto& c = *static_cast<const ForwardContext<Arithmetic>*>(context);
  const auto* partials = c.partials + index * c.parts * c.partial_size;
  task_of(c, index, scratch).combine(c.first_block(index), partials, c.parts, c.partial_size);
}

/// Rows of the packed tensors behind the last sequence.
template <typename Acc>
void clear_unused_rows(const ForwardParams& p) {
  if (!p.is_varlen_q()) return;
  const int64_t begin = p.cu_seqlens_q[p.batch];
  clear_packed_rows(p.out, p.dtype, begin, p.total_q, p.num_heads, p.head_dim_v);
  for (int64_t h = 0; h < p.num_heads; ++h) {
    for (int64_t row = begin; row < p.total_q; ++row) {
      static_cast<Acc*>(p.lse.data)[h * p.lse.head + row * p.lse.row] = -kInfinity<Acc>;
    }
  }
}

template <typename Arithmetic>
void run(const ForwardParams& params) {
  clear_unused_rows<typename Arithmetic::Acc>(params);
  ForwardContext<Arithmetic> context(params);
  const auto run_all = [&](int64_t count, Task task) { run_tasks(count, context.scratch_bytes, task, &context); };
  if (context.parts == 1) return run_all(context.tasks, forward_task<Arithmetic>);
  const int64_t numbers = context.tasks * context.parts * context.partial_size;
  const Buffer partials(numbers * int64_t(sizeof(typename Arithmetic::Acc)));
  context.partials = static_cast<typename Arithmetic::Acc*>(partials.data());
  run_all(context.tasks * context.parts, forward_part<Arithmetic>);
  run_all(context.tasks, combine_parts<Arithmetic>);
}

void run_forward(const ForwardParams& params) {
#if defined(__AVX512BF16__)
  if (params.dtype == DType::kBFloat16) return run<BFloat16Pairs>(params);
#else
  if (params.dtype == DType::kFloat64) return run<Plain<double> >(params);
  run<Plain<float> >(params);
#endif
}

}  // namespace
}  // namespace flash_attn::cpu
