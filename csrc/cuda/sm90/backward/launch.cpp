#include "launch.h"

#include <algorithm>
#include <type_traits>

#include "../../../philox.h"
#include "../../common/check.h"
#include "../../mask/band.h"
#include "../../mask/packed_mask.h"
#include "../../sm80/sm80.h"
#include "../hopper/tensor_map.h"
#include "../refusals.h"
#include "extended/classes.h"
#include "extended/reductions.h"
#include "params.h"
#include "postprocess/postprocess.h"
#include "preprocess/preprocess.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

/// The parts of the workspace, each from a multiple of 256 bytes on; null what the plan does not need.
struct Workspace {
  float* dq_accum = nullptr;
  uint4* statistics = nullptr;
  // 0 at first:
  int *next_tile = nullptr, *dq_flags = nullptr, *prepared = nullptr;
  BlockCounters* dq_counters = nullptr;
  uint16_t *dk_parts = nullptr, *dv_parts = nullptr;
  PackedBlock* packed_blocks = nullptr;
  // Of the kernels of extended/:
  int* blind = nullptr;
  float* slope_sums = nullptr;    // also 0 at first
  int* dmask_counters = nullptr;  // likewise
  uint8_t *packed_mask = nullptr, *tile_classes = nullptr, *dmask_workspace = nullptr;
  uint32_t* tile_bits = nullptr;
  int64_t bytes = 0, cleared_bytes = 0;  // of all; of those that are 0 at first, which lie side by side

  /// With `begin` null, sizes alone.
  Workspace(const Plan& plan, const BackwardParams& params, void* begin) {
    const auto place = [&](auto*& part, int64_t count) {
      if (begin != nullptr && count > 0) {
        part = reinterpret_cast<std::decay_t<decltype(part)>>(static_cast<char*>(begin) + bytes);
      }
      bytes += ceil_div(count * static_cast<int64_t>(sizeof(*part)), 256) * 256;
    };
    const ForwardParams& p = params.forward;
    const Variant& variant = *plan.variant;
    const int64_t blocks = p.num_heads * plan.num_blocks;
    const int64_t dq_blocks =
        variant.dq_path == DqPath::kOneCta ? plan.grid * p.group_size() * plan.num_m_blocks : blocks;
    place(dq_accum, dq_blocks * variant.block_m * variant.dq_columns);
    place(statistics, blocks * variant.block_m);
    cleared_bytes -= bytes;
    place(next_tile, 1);
    place(dq_counters, plan.dq.has_turns() ? blocks : 0);
    place(dq_flags, plan.dq.writing.enabled ? plan.order.num_tiles : 0);
    place(prepared, plan.preparation.ahead > 0 ? p.batch * p.num_heads : 0);
    place(slope_sums, params.dslopes != nullptr && variant.extended ? p.batch * p.num_heads * slope_numbers(plan) : 0);
    const int64_t dmask_blocks =
        p.mask.batch_size * p.mask.head_size * plan.order.num_n_blocks * variant.cluster * plan.num_m_blocks;
    place(dmask_counters, plan.extended.adds_dmask ? dmask_blocks : 0);
    cleared_bytes += bytes;
    const int64_t part_rows = plan.split.parts() > 1 ? p.total_k * p.num_heads_k * plan.split.stored() : 0;
    place(dk_parts, params.dk.data != nullptr ? part_rows * p.head_dim : 0);
    place(dv_parts, params.dv.data != nullptr ? part_rows * p.head_dim_v : 0);
    place(packed_blocks, p.is_varlen_k() ? plan.order.max_packed_blocks + 1 : 0);
    if (!variant.extended) return;
    place(blind, blocks * (variant.block_m / 64));
    place(packed_mask, mask_source(plan.extended, p) == MaskSource::kPacked ? mask::packing_workspace(p.mask) : 0);
    const int64_t classes = plan.extended.packs_mask ? num_tile_classes(p.mask, variant.block_m) : 0;
    place(tile_classes, classes);
    place(tile_bits, classes * bits_of_block(variant.block_m));
    place(dmask_workspace, plan.extended.dmask_bytes);
  }

  /// Of a query head, in slope_sums: one a tile and warp of consumers.
  static int64_t slope_numbers(const Plan& plan) { return int64_t{plan.order.num_n_blocks} * 8; }
};

/// dk and dv as the kernel stores them: with parts (rows of k, heads, columns) in the workspace.
struct KeyGradients {
  TensorView dk, dv;
  int64_t heads;

  KeyGradients(const Plan& plan, const BackwardParams& params, const Workspace& workspace)
      : dk(params.dk), dv(params.dv), heads(params.forward.num_heads_k * plan.split.stored()) {
    if (plan.split.parts() == 1) return;
    dk = parts(params.forward, workspace.dk_parts, params.forward.head_dim);
    dv = parts(params.forward, workspace.dv_parts, params.forward.head_dim_v);
  }

 private:
  TensorView parts(const ForwardParams& p, void* data, int64_t columns) const {
    return {data, p.is_varlen_k() ? 0 : p.seqlen_k * heads * columns, heads * columns, columns};
  }
};

PackedBlocksParams packed_blocks_params(const Plan& plan, const ForwardParams& p, const Workspace& workspace) {
  if (!p.is_varlen_k()) return {};
  PackedBlocksParams packed{};
  packed.blocks = workspace.packed_blocks;
  packed.num_blocks = plan.order.max_packed_blocks;
  packed.block_n = plan.variant->block_n;
  packed.heads = static_cast<int>(p.num_heads_k * plan.split.parts());
  packed.last_blocks = plan.order.last_packed_blocks;
  return packed;
}

Schedule schedule(const Plan& plan, const ForwardParams& p, const Workspace& workspace) {
  Schedule s{};
  s.num_batch_heads = static_cast<int>(p.batch * p.num_heads_k * plan.split.parts());
  s.num_n_blocks = plan.order.num_n_blocks;
  s.num_tiles = plan.order.num_tiles;
  s.heads_per_group = plan.order.heads_per_group;
  s.grouped_heads = plan.order.grouped_heads;
  s.falling = plan.order.falling;
  s.next_tile = plan.dynamic ? workspace.next_tile : nullptr;
  s.packed_blocks = workspace.packed_blocks;
  s.num_key_blocks = plan.order.max_packed_blocks;
  s.wide_groups = plan.order.wide_groups;
  s.tiles_at_once = plan.order.tiles_at_once;
  return s;
}

void set_tensor_maps(KernelParams& kernel, const Plan& plan, const BackwardParams& params,
                     const KeyGradients& gradients) {
  const ForwardParams& p = params.forward;
  const Variant& variant = *plan.variant;
  const auto query_map = [&](const TensorView& view, int64_t head_dim, int box_rows) {
    return make_tensor_map(query_rows(p, view, head_dim), box_rows);
  };
  const auto key_map = [&](const TensorView& view, int64_t heads, int64_t head_dim, int box_rows) {
    return make_tensor_map(key_rows(p, view, heads, head_dim), box_rows);
  };
  kernel.q = query_map(p.q, p.head_dim, variant.block_m);
  kernel.dout = query_map(params.dout, p.head_dim_v, variant.block_m);
  kernel.k = key_map(p.k, p.num_heads_k, p.head_dim, variant.map_rows);
  kernel.v = key_map(p.v, p.num_heads_k, p.head_dim_v, variant.map_rows);
  if (kernel.wants_dk) kernel.dk = key_map(gradients.dk, gradients.heads, p.head_dim, 16);
  if (kernel.wants_dv) kernel.dv = key_map(gradients.dv, gradients.heads, p.head_dim_v, 16);
  if (kernel.dq_writing.enabled()) kernel.dq_rows = query_map(params.dq, p.head_dim, kDqPieceRows);
  if (plan.extended.bias_by_tma) kernel.extended.bias = make_mask_map(p.mask, variant.block_m);
  if (kernel.preparation.enabled()) kernel.preparation.out = query_map(p.out, p.head_dim_v, variant.block_m);
}

int rules_of_all_scores(const Plan& plan, const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  return (p.has_bias() && !plan.extended.bias_by_tma ? extended::kLoadsBias : 0) |
         (p.dropout_p > 0.0 ? extended::kDropout : 0) | (p.alibi_slopes != nullptr ? extended::kAlibi : 0) |
         (p.softcap > 0.0 ? extended::kSoftcap : 0) | (plan.extended.stores_dmask ? extended::kDmask : 0) |
         (params.dslopes != nullptr ? extended::kDslopes : 0);
}

ExtendedParams extended_params(const Plan& plan, const BackwardParams& params, const Workspace& workspace) {
  const ForwardParams& p = params.forward;
  ExtendedParams extended{};
  if (!plan.variant->extended) return extended;
  if (plan.extended.packs_mask) {
    extended.classes = place_tile_classes(p.mask, plan.variant->block_m, workspace.tile_classes, workspace.tile_bits);
  }
  extended.has_bias = p.has_bias();
  extended.bias_by_tma = plan.extended.bias_by_tma;
  extended.rules = rules_of_all_scores(plan, params);
  extended.softcap = static_cast<float>(p.softcap);
  extended.scale_over_softcap = p.softcap > 0.0 ? static_cast<float>(p.softmax_scale / p.softcap) : 0.f;
  const int64_t no_state[2] = {};
  extended.dropout_scale = p.dropout_p > 0.0 ? static_cast<float>(make_dropout(no_state, p.dropout_p).scale) : 1.f;
  extended.slope_sums = workspace.slope_sums;
  extended.dmask = plan.extended.stores_dmask ? static_cast<float*>(params.dmask) : nullptr;
  extended.dmask_counters = workspace.dmask_counters;
  extended.blind = workspace.blind;
  return extended;
}

KernelParams kernel_params(const Plan& plan, const BackwardParams& params, const Workspace& workspace,
                           const KeyGradients& gradients, const mask::KindCondition& condition) {
  const ForwardParams& p = params.forward;
  KernelParams kernel{};
  kernel.problem = p;
  kernel.schedule = schedule(plan, p, workspace);
  kernel.split.heads = Divisor(p.num_heads_k * plan.split.parts());
  kernel.split.parts = Divisor(plan.split.parts());
  kernel.split.row_parts = Divisor(plan.split.row_parts);
  kernel.split.part_blocks = plan.split.part_blocks;
  kernel.split.heads_of_tile = static_cast<int>(p.group_size() / plan.split.head_parts);
  kernel.n_blocks = Divisor(plan.order.num_n_blocks);
  kernel.heads_per_group = Divisor(plan.order.heads_per_group);
  kernel.group_tiles = Divisor(plan.order.heads_per_group * plan.order.num_n_blocks);
  kernel.num_blocks = plan.num_blocks;
  kernel.num_m_blocks = plan.num_m_blocks;
  kernel.dq_accum = workspace.dq_accum;
  kernel.dq_protocol = plan.dq.protocol;
  kernel.dq_counters = workspace.dq_counters;
  kernel.spread_starts = plan.dq.spread_starts;
  kernel.dq = params.dq;
  kernel.statistics = workspace.statistics;
  if (const DqWritingPlan& writing = plan.dq.writing; writing.enabled) {
    kernel.dq_writing = {workspace.dq_flags, writing.lag, writing.by_last_block};
  }
  if (plan.preparation.ahead > 0) {
    kernel.preparation.dlse = params.dlse;
    kernel.preparation.prepared = workspace.prepared;
    kernel.preparation.ahead = plan.preparation.ahead;
    kernel.preparation.zeroes_dq = plan.dq.protocol == DqProtocol::kZeroed;
  }
  kernel.seqlen_q = static_cast<int>(p.seqlen_q);
  kernel.seqlen_k = static_cast<int>(p.seqlen_k);
  kernel.panels = static_cast<int>(ceil_div(p.head_dim, 64));
  kernel.panels_v = static_cast<int>(ceil_div(p.head_dim_v, 64));
  kernel.dense = p.is_dense();
  // A wider window than the longest sequence sees no more.
  kernel.window_left = static_cast<int>(std::min(p.window_left, p.seqlen_q + p.seqlen_k));
  kernel.window_right = static_cast<int>(std::min(p.window_right, p.seqlen_q + p.seqlen_k));
  kernel.softmax_scale = static_cast<float>(p.softmax_scale);
  kernel.inverse_scale = 1.f / kernel.softmax_scale;
  kernel.scale_log2 = static_cast<float>(p.softmax_scale * 1.4426950408889634);
  kernel.wants_dk = params.dk.data != nullptr;
  kernel.wants_dv = params.dv.data != nullptr;
  kernel.extended = extended_params(plan, params, workspace);
  kernel.condition = condition;
  set_tensor_maps(kernel, plan, params, gradients);
  return kernel;
}

RowsParams rows_params(const Plan& plan, const BackwardParams& params, const Workspace& workspace,
                       const mask::KindCondition& condition) {
  const ForwardParams& p = params.forward;
  const Variant& variant = *plan.variant;
  const float accum_factor = p.dtype == DType::kBFloat16 ? variant.accum_factor_bf16 : 1.f;
  RowsParams rows{};
  rows.problem = params;
  rows.block_m = variant.block_m;
  rows.m_blocks = SequenceBlocks::of_queries(p, variant.block_m);
  rows.dq_columns = variant.dq_columns;
  rows.num_blocks = plan.num_blocks;
  rows.num_m_blocks = plan.num_m_blocks;
  rows.dq_accum = workspace.dq_accum;
  rows.dq_scale = static_cast<float>(p.softmax_scale) / accum_factor;
  rows.zeroes_dq = plan.dq.protocol == DqProtocol::kZeroed || (variant.extended && variant.dq_path != DqPath::kWarp);
  if (variant.extended && !rows.zeroes_dq) rows.dq_counters = workspace.dq_counters;
  rows.statistics = workspace.statistics;
  rows.extended = variant.extended;
  rows.blind = workspace.blind;
  rows.prepared_heads = plan.preparation.heads;
  rows.prepared_tiles = plan.preparation.tiles;
  rows.cleared = reinterpret_cast<uint4*>(workspace.next_tile);
  rows.num_cleared = workspace.cleared_bytes / static_cast<int64_t>(sizeof(uint4));
  rows.packed_blocks = packed_blocks_params(plan, p, workspace);
  rows.condition = condition;
  if (variant.extended && mask_source(plan.extended, p) == MaskSource::kBytes) {
    const TileClassSizes sizes(p.mask, variant.block_m);
    rows.unpacked_mask = {place_tile_classes(p.mask, variant.block_m, workspace.tile_classes, workspace.tile_bits),
                          static_cast<int>(sizes.key_blocks), static_cast<int>(sizes.query_blocks),
                          static_cast<int>(sizes.slices * sizes.key_blocks * sizes.query_blocks)};
  }
  return rows;
}

}  // namespace

BackwardParams of_dmask_alone(const BackwardParams& params) {
  BackwardParams alone = params;
  alone.dq.data = alone.dk.data = alone.dv.data = alone.dslopes = alone.dsinks = nullptr;
  return alone;
}

namespace {

/// attn_mask, read once; and the gradients that are 0 where no tile comes.
void prepare_mask(const Plan& plan, const BackwardParams& params, const KernelParams& kernel,
                  const Workspace& workspace, cudaStream_t stream) {
  const MaskView& mask = params.forward.mask;
  if (mask_source(plan.extended, params.forward) == MaskSource::kPacked) {
    const mask::PackedMask packed = cuda::mask::packed_or_pack(mask, workspace.packed_mask, stream);
    fill_tile_classes(mask, packed, plan.variant->block_m, kernel.extended.classes, kernel.condition, stream);
  }
  const ForwardParams& p = params.forward;
  const bool stores_all = p.is_dense() && !p.has_window() && !plan.extended.packs_mask;
  if (plan.extended.stores_dmask && !stores_all) {
    const int64_t numbers = mask.batch_size * mask.head_size * mask.row_size * mask.col_size;
    check(cudaMemsetAsync(params.dmask, 0, static_cast<size_t>(numbers) * sizeof(float), stream), "sm90 dmask");
  }
}

void launch_dmask(const BackwardParams& params, const DeviceInfo& device, const Workspace& workspace,
                  cudaStream_t stream) {
  BackwardParams alone = of_dmask_alone(params);
  alone.forward.workspace = workspace.dmask_workspace;
  sm80::kBackward.launch(alone, device, stream);
}

/// All launches of one plan, which do nothing if the condition excludes them.
void launch_plan(const Plan& plan, const BackwardParams& params, const mask::KindCondition& condition,
                 const DeviceInfo& device, cudaStream_t stream) {
  const Variant& variant = *plan.variant;
  const Workspace workspace(plan, params, params.forward.workspace);
  const KeyGradients gradients(plan, params, workspace);
  const KernelParams kernel = kernel_params(plan, params, workspace, gradients, condition);
  const RowsParams rows = rows_params(plan, params, workspace, condition);
  if (variant.extended) prepare_mask(plan, params, kernel, workspace, stream);
  launch_preprocess(rows, stream);
  const Launch& launch = plan.split.row_parts > 1 ? variant.launch_row_parts : variant.launch;
  (params.forward.dtype == DType::kBFloat16 ? launch.bf16 : launch.fp16)(kernel, plan.grid, stream);
  if (params.dq.data != nullptr && variant.dq_path != DqPath::kOneCta && !plan.dq.writing.enabled)
    launch_convert_dq(rows, stream);
  if (plan.split.parts() > 1) {
    launch_add_parts({params, gradients.dk, gradients.dv, plan.split.stored()}, condition, stream);
  }
  if (!variant.extended) return;
  if (params.dslopes != nullptr) {
    reduce_slopes(params, {workspace.slope_sums, Workspace::slope_numbers(plan)}, stream);
  }
  if (params.dsinks != nullptr) reduce_sinks(rows, stream);
  if (plan.extended.computes_dmask) launch_dmask(params, device, workspace, stream);
}

/// Of attn_mask with its kind, before what plans need; none if it was packed before.
int64_t mask_bytes(const MaskView& mask) {
  return mask.packed != nullptr ? 0 : ceil_div(mask::stored_bytes(mask), 256) * 256;
}

/// Packs attn_mask at the beginning of the problem's workspace.
cuda::mask::KnownMask pack_mask(BackwardParams& params, cudaStream_t stream, bool looks_for_band) {
  MaskView& mask = params.forward.mask;
  const int64_t bytes = mask_bytes(mask);
  void* const data = mask.packed != nullptr ? mask.packed : params.forward.workspace;
  const cuda::mask::KnownMask known = cuda::mask::pack_with_kind(mask, data, stream, looks_for_band);
  mask.packed = data;
  params.forward.workspace = static_cast<char*>(params.forward.workspace) + bytes;
  return known;
}

/// As it is for the plans: packed, wherever.
BackwardParams with_packed_mask(BackwardParams params) {
  if (params.forward.mask.packed == nullptr) params.forward.mask.packed = params.forward.mask.data;
  return params;
}

BackwardParams backward_of_band(const BackwardParams& params) {
  BackwardParams banded = params;
  banded.forward = sm90::band_problem(params.forward);
  return banded;
}

BackwardParams backward_of_bits(const BackwardParams& params) {
  BackwardParams bits = params;
  bits.forward = sm90::bits_problem(params.forward);
  return bits;
}

}  // namespace

MaskSource mask_source(const ExtendedPlan& plan, const ForwardParams& p) {
  constexpr int64_t kMostBytes = int64_t{1} << 20;  // more of them packing reads faster, by whole rows
  if (!plan.packs_mask) return MaskSource::kTiles;
  const int64_t bytes = p.mask.batch_size * p.mask.head_size * p.mask.row_size * p.mask.col_size;
  return p.has_bool_mask() && p.mask.packed == nullptr && bytes <= kMostBytes ? MaskSource::kBytes
                                                                              : MaskSource::kPacked;
}

Plans choose_plans(const BackwardParams& params, const DeviceInfo& device) {
  return {choose_plan(params, device), choose_band_plan(params, device), choose_bits_plan(params, device)};
}

int64_t workspace_bytes(const Plans& plans, const BackwardParams& params) {
  if (!plans.depend_on_kind()) return Workspace(plans.plan, params, nullptr).bytes;
  int64_t bytes = Workspace(plans.plan, with_packed_mask(params), nullptr).bytes;
  const auto widen = [&](const Plan& plan, const BackwardParams& problem) {
    bytes = std::max(bytes, Workspace(plan, problem, nullptr).bytes);
  };
  if (plans.has_band()) widen(plans.of_band, backward_of_band(params));
  if (plans.has_bits()) widen(plans.of_bits, backward_of_bits(params));
  return mask_bytes(params.forward.mask) + bytes;
}

void launch_plans(const Plans& plans, const BackwardParams& params, const DeviceInfo& device, cudaStream_t stream) {
  if (!plans.depend_on_kind()) return launch_plan(plans.plan, params, {}, device, stream);
  BackwardParams packed = params;
  const cuda::mask::KnownMask known = pack_mask(packed, stream, plans.has_band());
  if (plans.has_band()) {
    launch_plan(plans.of_band, backward_of_band(packed), mask::KindCondition::is_band(*known.kind), device, stream);
  }
  if (plans.has_bits()) {
    launch_plan(plans.of_bits, backward_of_bits(packed), known.only_hides(plans.has_band()), device, stream);
  }
  launch_plan(plans.plan, packed, known.others(plans.has_bits()), device, stream);
}

}  // namespace flash_attn::cuda::sm90::backward
