// The Hopper family's forward entry: what it takes, its plan, its launch.
#include <initializer_list>

#include "../../common/tiles/sequence_blocks.h"
#include "../hopper/tensor_map.h"
#include "../refusals.h"
#include "../sm90.h"
#include "params.h"
#include "plan.h"

namespace flash_attn::cuda::sm90::forward {
namespace {

const char* refuses_tensors(const ForwardParams& p) {
  const Sources tensors = sources(p);
  for (const TensorMapSource& source : {tensors.q, tensors.k, tensors.v, tensors.out}) {
    if (const char* reason = tensor_map_refuses(source)) return reason;
  }
  return nullptr;
}

const char* refuses(const ForwardParams& p, const DeviceInfo& device) {
  if (const char* reason = refuses_in_both_passes(p, device)) return reason;
  // Tile indices are 32-bit, parts of split tiles included.
  const double tiles = double(SequenceBlocks::of_queries(p, 128).count()) * double(p.num_heads);
  if (tiles >= double(1 << 27)) return "there are over 2^27 tiles";
  // The running maximum is one of unscaled scores, and -inf times the scale has to stay -inf.
  if (!(p.softmax_scale >= 1e-20 && p.softmax_scale <= 1e6)) return "softmax_scale is not between 1e-20 and 1e6";
  return refuses_tensors(p);
}

const char* name_of(TileSchedule::Order order) {
  switch (order) {
    case TileSchedule::kLongestFirst: return "longest processing time first";
    case TileSchedule::kPacked: return "sequence by sequence";
    default: return "head by head";
  }
}

auto launch_of(const Plan& plan, const ForwardParams& p) {
  return p.dtype == DType::kBFloat16 ? plan.variant->launch_bf16 : plan.variant->launch_fp16;
}

/// The plan, and those that come before it if they have a variant.
struct Plans {
  Plan plan, of_band, of_bits;
  int64_t bytes;  // of workspace

  Plans(const ForwardParams& p, const DeviceInfo& device, void* workspace)
      : plan(choose_plan(p, device)), of_band(choose_band_plan(p, device)), of_bits(choose_bits_plan(p, device)) {
    plan.depends_on_kind = has_band() || has_bits();
    bytes = place_workspace(plan, p, workspace);
    const auto place = [&](Plan& other, const ForwardParams& problem) {
      bytes += place_workspace(other, problem, workspace == nullptr ? nullptr : static_cast<char*>(workspace) + bytes);
    };
    if (has_band()) place(of_band, band_problem(p));
    if (has_bits()) place(of_bits, bits_problem(p));
  }

  bool has_band() const { return of_band.variant != nullptr; }
  bool has_bits() const { return of_bits.variant != nullptr; }

  /// What each waits for.
  void set_conditions(const mask::KnownMask& known) {
    of_band.condition = mask::KindCondition::is_band(*known.kind);
    of_bits.condition = known.only_hides(has_band());
    plan.condition = known.others(has_bits());
    of_bits.packed = plan.packed = known.packed;
  }
};

flash_attn::Plan plan(const ForwardParams& p, const DeviceInfo& device) {
  const Plans plans(p, device, nullptr);
  const Plan& chosen = plans.plan;
  flash_attn::Plan plan{chosen.variant->name, chosen.variant->block_m, chosen.variant->block_n, plans.bytes};
  plan.decide("ctas", chosen.grid);
  plan.decide("order", name_of(chosen.schedule.order));
  plan.decide("counter", chosen.dynamic);
  plan.decide("key_splits", chosen.schedule.num_splits);
  if (p.mask.data != nullptr) {
    plan.decide("mask", p.mask.packed != nullptr ? "prepared" : chosen.packs_mask ? "packed first" : "read by tiles");
    plan.decide("if_band", plans.has_band() ? plans.of_band.variant->name : "none");
    plan.decide("if_bits", plans.has_bits() ? plans.of_bits.variant->name : "none");
  }
  return plan;
}

void launch(const ForwardParams& p, const DeviceInfo& device, void* stream) {
  Plans plans(p, device, p.workspace);
  Plan& chosen = plans.plan;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (chosen.depends_on_kind) {
    plans.set_conditions(mask::pack_with_kind(p.mask, chosen.mask_workspace, cuda_stream, plans.has_band()));
    if (plans.has_band()) launch_of(plans.of_band, p)(band_problem(p), plans.of_band, cuda_stream);
    if (plans.has_bits()) launch_of(plans.of_bits, p)(bits_problem(p), plans.of_bits, cuda_stream);
  } else if (chosen.packs_mask) {
    chosen.packed = mask::packed_or_pack(p.mask, chosen.mask_workspace, cuda_stream);
  } else if (chosen.mask_workspace != nullptr) {  // else the tiles look at what they have loaded of V
    chosen.bad_rows = mask::find_bad_rows(p, chosen.mask_workspace, cuda_stream);
  }
  launch_of(chosen, p)(p, chosen, cuda_stream);
}

}  // namespace

const ForwardKernel kKernel = {"sm90", refuses, plan, launch};

}  // namespace flash_attn::cuda::sm90::forward
