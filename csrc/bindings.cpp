// flash_attn._C: what was built, and which kernel a problem would get. No torch: tensors arrive as plain numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gathered_cache.h"
#include "ops/arguments/arguments.h"
#include "ops/arguments/cache_arguments.h"
#include "ops/arguments/rotary_arguments.h"
#include "select_kernel.h"

namespace py = pybind11;
using namespace flash_attn;

namespace {

constexpr const char* kDTypes[] = {"float64", "float32", "bfloat16", "float16", "bool", "int32", "int64"};

/// (address, dtype, device index or -1 for the CPU and TensorInfo::kMeta, sizes, strides)
using TensorTuple = std::tuple<uint64_t, std::string, int, std::vector<int64_t>, std::vector<int64_t>>;

TensorInfo tensor_info(const char* name, const TensorTuple& tensor) {
  const auto& [address, dtype, device, sizes, strides] = tensor;
  TensorInfo info;
  info.data = reinterpret_cast<void*>(address);
  for (int i = 0; i < int(DType::kOther); ++i) {
    if (dtype == kDTypes[i]) info.dtype = DType(i);
  }
  if (dtype == dtype_name(kFloat8E4M3)) info.dtype = kFloat8E4M3;
  info.device = device < 0 ? DeviceType::kCPU : DeviceType::kCUDA;
  info.device_index = device == -1 ? 0 : device;
  check_ndim(name, int64_t(sizes.size()));
  info.ndim = int(sizes.size());
  for (int i = 0; i < info.ndim; ++i) {
    info.size[i] = sizes[i];
    info.stride[i] = strides[i];
  }
  return info;
}

using TensorTuples = std::map<std::string, TensorTuple>;

/// `tensors` and `options` are named as in the op's schema.
template <typename List>
List arguments_of(const TensorTuples& tensors, const py::dict& options) {
  List a;
  a.for_each_tensor([&](const char* name, auto& tensor) {
    const auto found = tensors.find(name);
    if (found != tensors.end()) tensor = tensor_info(name, found->second);
  });
  a.for_each_option([&](const char* name, const char*, auto& value) {
    value = options[name].template cast<std::remove_reference_t<decltype(value)>>();
  });
  return a;
}

/// Raises what the op would raise for such arguments; data are not read. For backward also dout, dlse, out and lse are
/// among the tensors, and `needs` says which gradients are wanted.
void check(const TensorTuples& tensors, const py::dict& options, const std::optional<std::vector<bool>>& needs) {
  const auto a = arguments_of<Arguments>(tensors, options);
  const ForwardParams params = make_forward_params(a, /*read_lengths=*/false);
  if (!needs) return;
  const auto saved = [&](const char* name) { return tensor_info(name, tensors.at(name)); };
  std::optional<TensorInfo> dlse;
  if (tensors.count("dlse")) dlse = saved("dlse");
  check_saved(a, params, {saved("dout"), dlse, saved("out"), saved("lse"), *needs});
}

/// The same of attend_cache, append_and_attend and the rotary ops.
void check_cache(const TensorTuples& tensors, const py::dict& options) {
  make_cache_params(arguments_of<CacheArguments>(tensors, options), /*read_values=*/false);
}

void check_append(const TensorTuples& tensors, const py::dict& options) {
  const auto a = arguments_of<AppendArguments>(tensors, options);
  make_append_params(a, /*read_values=*/false);
  make_cache_params(a.attention(), /*read_values=*/false);
}

void check_rotary(const TensorTuples& tensors, const py::dict& options) {
  make_rotary_params(arguments_of<RotaryArguments>(tensors, options), /*read_values=*/false);
}

template <typename Params>
py::dict describe(const std::vector<const Kernel<Params>*>& kernels, const Params& params, const DeviceInfo& info) {
  std::vector<Rejection> rejections;
  const Kernel<Params>& kernel = select_kernel(kernels, params, info, &rejections);
  const Plan plan = kernel.plan(params, info);
  py::list rejected;
  for (const Rejection& r : rejections) rejected.append(py::make_tuple(r.family, r.reason));
  py::dict d;
  d["family"] = kernel.family;
  d["kernel"] = plan.kernel;
  d["tile"] = py::make_tuple(plan.block_m, plan.block_n);
  d["workspace_bytes"] = plan.workspace_bytes;
  py::dict decisions;
  for (int i = 0; i < plan.num_decisions; ++i) {
    const Decision& decision = plan.decisions[i];
    if (decision.word != nullptr) {
      decisions[decision.name] = decision.word;
    } else {
      decisions[decision.name] = decision.number;
    }
  }
  d["decisions"] = decisions;
  d["rejected"] = rejected;
  return d;
}

/// (compute capability, SMs, shared memory of a block, L2 cache), in bytes
using DeviceTuple = std::tuple<int, int, int, int64_t>;

DeviceInfo device_info(const DeviceTuple& device) {
  const auto& [compute_capability, num_sms, shared_memory_per_block, l2_bytes] = device;
  return {compute_capability, num_sms, shared_memory_per_block, l2_bytes};
}

/// Plans of the forward and the backward pass of a problem. `needs` says which of q, k, v, attn_mask, alibi_slopes and
/// sinks want a gradient. Data are not read. `device` is the one to plan for, if not the tensors' own: a plan can be
/// asked for where no such GPU is.
py::dict plan(const TensorTuples& tensors, const py::dict& options, const std::vector<bool>& needs,
              const std::optional<DeviceTuple>& device) {
  const auto a = arguments_of<Arguments>(tensors, options);
  BackwardParams params;
  ForwardParams& p = params.forward;
  p = make_forward_params(a, /*read_lengths=*/false);
  TensorInfo out = a.q;  // outputs are dense, in q's memory order
  out.size[out.ndim - 1] = p.head_dim_v;
  dense_strides_like(a.q, p.head_dim_v, out.stride);
  p.out = tensor_view(out, a.heads_first);
  const Backend& backend = backend_of(p.device);
  const DeviceInfo info = device ? device_info(*device) : backend.device_info(p.device_index);
  py::dict result;
  result["forward"] = describe(backend.forward, p, info);
  params.dout = p.out;
  if (needs[0]) params.dq = p.q;
  if (needs[1]) params.dk = p.k;
  if (needs[2]) params.dv = p.v;
  if (needs[3]) {
    keep_shape_of_mask(a, p);
    params.dmask = p.mask.data;
  }
  if (needs[4]) params.dslopes = const_cast<void*>(p.alibi_slopes);
  if (needs[5]) params.dsinks = const_cast<void*>(p.sinks);
  result["backward"] = describe(backend.backward, params, info);
  return result;
}

/// The plan of attention over a cache, as `plan` has those of attention; where rows of it are copied first, with their
/// bytes.
py::dict plan_cache(const TensorTuples& tensors, const py::dict& options, const std::optional<DeviceTuple>& device) {
  const auto a = arguments_of<CacheArguments>(tensors, options);
  ForwardParams p = make_cache_params(a, /*read_values=*/false);
  TensorInfo out = a.q;
  out.size[out.ndim - 1] = p.head_dim_v;
  dense_strides_like(a.q, p.head_dim_v, out.stride);
  p.out = tensor_view(out, /*heads_first=*/false);
  const Backend& backend = backend_of(p.device);
  const DeviceInfo info = device ? device_info(*device) : backend.device_info(p.device_index);
  if (is_float8(a.k_cache)) return describe(backend.float8, make_float8_params(a, p), info);
  const bool gathers = gathers_cache(p, backend.forward, info);
  const GatheredCache gathered(p);
  py::dict result = describe(backend.forward, gathers ? gathered.params : p, info);
  if (gathers) result["copied_bytes"] = gathered.bytes;
  return result;
}

py::dict build_info() {
  py::dict d;
  d["compiler"] = FLASH_ATTN_COMPILER;
  d["cuda"] = FLASH_ATTN_CUDA_VERSION;  // "" when CUDA kernels were not built
  d["cuda_archs"] = FLASH_ATTN_CUDA_ARCHS;
  d["cuda_reason"] = FLASH_ATTN_CUDA_REASON;
  d["torch_headers"] = FLASH_ATTN_TORCH_VERSION;
  return d;
}

py::dict kernels() {
  const auto names = [](const Backend& backend) {
    py::list forward, backward;
    for (const auto* kernel : backend.forward) forward.append(kernel->family);
    for (const auto* kernel : backend.backward) backward.append(kernel->family);
    return py::make_tuple(forward, backward);
  };
  py::dict d;
  d["cpu"] = names(cpu_backend());
#ifdef FLASH_ATTN_WITH_CUDA
  d["cuda"] = names(cuda_backend());
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What flash_attn was built with, and which kernel a problem would get.";
  m.def("build_info", &build_info, "Compiler, CUDA version and architectures of this build.");
  m.def("kernels", &kernels, "device -> (forward families, backward families), fastest first.");
  m.def("check", &check, py::arg("tensors"), py::arg("options"), py::arg("needs") = py::none());
  m.def("check_cache", &check_cache, py::arg("tensors"), py::arg("options"));
  m.def("check_append", &check_append, py::arg("tensors"), py::arg("options"));
  m.def("check_rotary", &check_rotary, py::arg("tensors"), py::arg("options"));
  m.def("plan_cache", &plan_cache, py::arg("tensors"), py::arg("options"), py::arg("device") = py::none());
  m.def("plan", &plan, py::arg("tensors"), py::arg("options"), py::arg("needs"), py::arg("device") = py::none());
}
