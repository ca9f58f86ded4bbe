// The family's entries: what it refuses, what it plans, and its launch.
#include "decode.h"

#include <algorithm>

#include "../common/launch.h"
#include "../sm80/code.h"
#include "../universal/rows.h"
#include "plan.h"

namespace flash_attn::cuda::decode {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 28;  // of a sequence, so that places and differences of rows stay in 32 bits
constexpr double kMaxUnits = double(1 << 30);
constexpr int64_t kFewRows = 64;  // packed; with more, tiles read the same keys again
constexpr int64_t kFewQueries = 16;
constexpr int kPortableCluster = 8;
constexpr int64_t kMaxHeadDimElsewhere = 512;  // of other kernels with tensor cores

/// `columns`: elements of 16 bytes.
bool is_aligned(const TensorView& view, int columns) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch % columns == 0 && view.row % columns == 0 &&
         view.head % columns == 0;
}

/// Where ordinary kernels would do as well or better; nothing but this one and the universal kernels read caches.
const char* refuses_ordinary(const ForwardParams& p) {
  if (p.cache.exists()) return nullptr;
  if (p.is_varlen_k()) return "keys are packed";
  if (p.seqlen_q > kFewQueries) return "there are over 16 query rows";
  if (p.seqlen_q * p.group_size() > kFewRows) return "over 64 query rows read the same keys";
  return nullptr;
}

const char* refuses(const ForwardParams& p, const DeviceInfo& device, bool float8) {
  if (device.compute_capability < 80) return "the device is older than compute capability 8.0";
  if (float8 && device.compute_capability < 89) return "float8 needs compute capability 8.9";
  if (!sm80::has_code_for(device.compute_capability, FLASH_ATTN_SM80_ARCHS)) {
    return "this build has no code of the family for the device's compute capability";
  }
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return "the dtype is neither bfloat16 nor float16";
  if (p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0 || p.seqlen_k == 0) return "a tensor is empty";
  if ((p.head_dim > kMaxHeadDim || p.head_dim_v > kMaxHeadDim) && !is_latent(p, device, float8)) {
    return "head_dim is over 256";
  }
  if (float8 && (p.head_dim % 16 != 0 || p.head_dim_v % 16 != 0)) {
    return "head_dim is not a multiple of 16, which float8 needs";
  }
  if (p.head_dim == 0 || p.head_dim_v == 0 || p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0) {
    return "head_dim is not a multiple of 8";
  }
  if (p.mask.data != nullptr) return "there is an attn_mask";
  if (p.dropout_p > 0.0) return "there is dropout";
  const char* const better_elsewhere = refuses_ordinary(p);
  const bool alone = is_latent(p, device, float8) && p.head_dim > kMaxHeadDimElsewhere && !p.is_varlen_k();
  if (better_elsewhere != nullptr && !alone) return better_elsewhere;
  const int stored = float8 ? 16 : 8;
  if (!is_aligned(p.q, 8) || !is_aligned(p.k, stored) || !is_aligned(p.v, stored) || !is_aligned(p.out, 8)) {
    return "rows are not aligned to 16 bytes";
  }
  if (p.seqlen_q * p.group_size() >= kMaxRows || p.seqlen_k >= kMaxRows) return "a sequence is of over 2^28 rows";
  const DecodePlan plan = plan_decode(p, device, float8);
  if (plan.variant == nullptr) return "no kernel of this head dimension fits into shared memory";
  if (max_units(p, *plan.variant) >= kMaxUnits) return "there are over 2^30 blocks of keys";
  return nullptr;
}

Plan plan(const ForwardParams& p, const DeviceInfo& device, bool float8) {
  const DecodePlan chosen = plan_decode(p, device, float8);
  Plan plan{chosen.variant->name, chosen.variant->block_m, chosen.variant->block_n, chosen.workspace_bytes()};
  plan.decide("ctas", chosen.ctas);
  plan.decide("stages", chosen.stages);
  plan.decide("cluster", chosen.cluster);
  return plan;
}

/// From Hopper on a kernel may start before the one before it has ended, and CTAs may be clusters.
void launch_kernel(void (*kernel)(DecodeParams), const DecodePlan& plan, const DeviceInfo& device,
                   const DecodeParams& params, cudaStream_t stream) {
  const Variant& variant = *plan.variant;
  const void* const function = reinterpret_cast<const void*>(kernel);
  const int shared_bytes = int(plan.shared_bytes());
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), variant.name);
  if (plan.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), variant.name);
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = unsigned(plan.cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.ctas));
  config.blockDim = dim3(unsigned(variant.threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = device.compute_capability < 90 ? 0 : plan.cluster > 1 ? 2 : 1;
  void* arguments[] = {const_cast<DecodeParams*>(&params)};
  check(cudaLaunchKernelExC(&config, function, arguments), variant.name);
}

/// `float8` is the same problem, or null.
void launch(const ForwardParams& p, const Float8Params* float8, const DeviceInfo& device, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const DecodePlan chosen = plan_decode(p, device, float8 != nullptr);
  const Variant& variant = *chosen.variant;
  if (p.is_varlen_q()) {  // rows of no sequence
    universal::fill_rows(p.out, p.dtype, 1, p.total_q, p.num_heads, p.head_dim_v, stream);
    universal::fill_lse(p, stream);
  }
  DecodeParams params;
  params.problem = p;
  if (float8 != nullptr) params.k_descale = float8->k_descale, params.v_descale = float8->v_descale;
  params.group = Divisor(p.group_size());
  params.page = Divisor(p.cache.block_table != nullptr ? p.cache.page_size : 1);
  params.whole_rows =
      p.head_dim == variant.head_dim && p.head_dim_v == variant.head_dim_v && p.cache.page_size % 16 == 0;
  params.scores_as_they_are = p.softcap == 0.0 && p.alibi_slopes == nullptr;
  params.alike = p.is_dense() && p.cache.first == nullptr;
  params.early = params.alike && p.cache.block_table == nullptr && p.cache.batch_index == nullptr;
  params.num_heads_k = int(p.num_heads_k);
  params.stages = chosen.stages;
  params.cluster = chosen.cluster;
  const int64_t tiles = tiles_of(p, variant);
  params.tile_ctas = Divisor(std::max<int64_t>(1, chosen.ctas / tiles));
  params.sequence_tiles = Divisor(tiles / p.batch);
  params.launch_id = new_launch_id() * 0x9e3779b97f4a7c15ull;  // whose upper 48 bits differ from launch to launch
  unsigned char* const workspace = static_cast<unsigned char*>(p.workspace);
  params.arrivals = reinterpret_cast<uint64_t*>(workspace);
  params.partial_out = reinterpret_cast<float*>(workspace + chosen.arrivals_bytes());
  params.partial_statistics =
      reinterpret_cast<float2*>(params.partial_out + chosen.ctas * variant.partial_rows() * variant.head_dim_v);
  launch_kernel(variant.kernel[p.dtype == DType::kBFloat16 ? 0 : 1], chosen, device, params, stream);
}

}  // namespace

extern const ForwardKernel kForward = {
    "decode",
    [](const ForwardParams& p, const DeviceInfo& device) { return refuses(p, device, false); },
    [](const ForwardParams& p, const DeviceInfo& device) { return plan(p, device, false); },
    [](const ForwardParams& p, const DeviceInfo& device, void* stream) { launch(p, nullptr, device, stream); },
};
extern const Kernel<Float8Params> kFloat8Forward = {
    "decode",
    [](const Float8Params& p, const DeviceInfo& device) { return refuses(p, device, true); },
    [](const Float8Params& p, const DeviceInfo& device) { return plan(p, device, true); },
    [](const Float8Params& p, const DeviceInfo& device, void* stream) { launch(p, &p, device, stream); },
};

}  // namespace flash_attn::cuda::decode
