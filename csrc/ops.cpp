// The ops flash_attn::forward and flash_attn::backward: schemas, and one implementation for every device: check, plan,
// allocate, launch. Autograd, fake kernels and everything else that needs no C++ is registered in flash_attn/torch_op.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/cpu.h"
#include "dispatch.h"

namespace flash_attn {

namespace cpu {

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

int num_threads() { return int(torch::stable::get_num_threads()); }

}  // namespace cpu

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Bool: return DType::kBool;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    default: return DType::kOther;
  }
}

int32_t shim_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return aoti_torch_dtype_float64();
    case DType::kFloat32: return aoti_torch_dtype_float32();
    case DType::kBFloat16: return aoti_torch_dtype_bfloat16();
    case DType::kFloat16: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_uint8();
  }
}

TensorInfo info_of(const Tensor& tensor, const char* name) {
  TensorInfo info;
  info.ndim = int(tensor.dim());
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (info.ndim > TensorInfo::kMaxDims) {
    throw std::runtime_error(std::string(name) + " must have at most 4 dimensions, but has " +
                             std::to_string(info.ndim));
  }
  for (int i = 0; i < info.ndim; ++i) {
    info.size[i] = sizes[i];
    info.stride[i] = strides[i];
  }
  info.data = tensor.data_ptr();
  info.dtype = dtype_of(tensor);
  if (tensor.is_cpu()) {
    info.device = DeviceType::kCPU;
  } else if (tensor.is_cuda()) {
    info.device = DeviceType::kCUDA;
    info.device_index = tensor.get_device_index();
  } else {
    throw std::runtime_error(std::string(name) + " must be on the CPU or a CUDA device");
  }
  return info;
}

std::optional<TensorInfo> info_of(const OptionalTensor& tensor, const char* name) {
  if (!tensor) return std::nullopt;
  return info_of(*tensor, name);
}

/// Kernels read rows: a tensor whose last dimension is not contiguous is replaced by a copy, and described anew.
void make_unit_stride(Tensor& tensor, TensorInfo& info, const char* name) {
  const int last = info.ndim - 1;
  if (last < 0 || info.size[last] <= 1 || info.stride[last] == 1) return;
  tensor = torch::stable::contiguous(tensor);
  info = info_of(tensor, name);
}

/// A new tensor. When memory runs out the text starts with "CUDA out of memory": Python raises torch.OutOfMemoryError.
Tensor empty_strided(int ndim, const int64_t* sizes, const int64_t* strides, DType dtype, const TensorInfo& like,
                     const char* name) {
  AtenTensorHandle handle = nullptr;
  const bool on_cpu = like.device == DeviceType::kCPU;
  const int32_t device = on_cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  if (aoti_torch_empty_strided(ndim, sizes, strides, shim_dtype(dtype), device, on_cpu ? 0 : like.device_index,
                               &handle) != 0) {
    double bytes = size_of(dtype);
    for (int i = 0; i < ndim; ++i) bytes *= double(sizes[i]);
    char text[200];
    std::snprintf(text, sizeof(text), "%s out of memory: flash_attn could not allocate %.1f MiB for %s",
                  on_cpu ? "CPU" : "CUDA", bytes / (1 << 20), name);
    throw std::runtime_error(text);
  }
  return Tensor(handle);
}

/// Uninitialised, with the sizes of `like` but `last` columns, dense, in `like`'s memory order.
Tensor empty_like_dense(const TensorInfo& like, int64_t last, const char* name) {
  int64_t sizes[TensorInfo::kMaxDims], strides[TensorInfo::kMaxDims];
  for (int i = 0; i < like.ndim; ++i) sizes[i] = like.size[i];
  sizes[like.ndim - 1] = last;
  dense_strides_like(like, last, strides);
  return empty_strided(like.ndim, sizes, strides, like.dtype, like, name);
}

Tensor empty_contiguous(int ndim, const int64_t* sizes, DType dtype, const TensorInfo& like, const char* name) {
  int64_t strides[TensorInfo::kMaxDims];
  int64_t next = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    strides[i] = next;
    next *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided(ndim, sizes, strides, dtype, like, name);
}

/// The arguments of forward as tensors that stay alive, and what is known of them.
struct Inputs {
  Tensor q, k, v;
  TensorInfo q_given, k_given, v_given;  // before any copy: their memory order is the results'
  Arguments arguments;

  Inputs(const Tensor& q_tensor, const Tensor& k_tensor, const Tensor& v_tensor, const OptionalTensor& attn_mask,
         const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& cu_seqlens_q,
         const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_q, const OptionalTensor& seqused_k,
         const OptionalTensor& rng_state, int64_t max_seqlen_q, int64_t max_seqlen_k,
         std::optional<double> softmax_scale, int64_t causal, int64_t window_left, int64_t window_right, double softcap,
         double dropout_p, bool heads_first, bool deterministic)
      : q(q_tensor),
        k(k_tensor),
        v(v_tensor),
        q_given(info_of(q, "q")),
        k_given(info_of(k, "k")),
        v_given(info_of(v, "v")),
        arguments{q_given,
                  k_given,
                  v_given,
                  info_of(attn_mask, "attn_mask"),
                  info_of(alibi_slopes, "alibi_slopes"),
                  info_of(sinks, "sinks"),
                  info_of(cu_seqlens_q, "cu_seqlens_q"),
                  info_of(cu_seqlens_k, "cu_seqlens_k"),
                  info_of(seqused_q, "seqused_q"),
                  info_of(seqused_k, "seqused_k"),
                  info_of(rng_state, "rng_state"),
                  max_seqlen_q,
                  max_seqlen_k,
                  softmax_scale,
                  causal,
                  window_left,
                  window_right,
                  softcap,
                  dropout_p,
                  heads_first,
                  deterministic} {
    make_unit_stride(q, arguments.q, "q");
    make_unit_stride(k, arguments.k, "k");
    make_unit_stride(v, arguments.v, "v");
  }
};

const Backend& backend_of(const ForwardParams& params) {
#ifdef FLASH_ATTN_WITH_CUDA
  if (params.device == DeviceType::kCUDA) return cuda_backend();
#else
  if (params.device == DeviceType::kCUDA) {
    throw std::runtime_error(
        "flash_attn got CUDA tensors, but was built without CUDA kernels: rebuild with nvcc and FLASH_ATTN_CUDA=1");
  }
#endif
  return cpu_backend();
}

/// Makes the tensors' device current while it lives.
class DeviceScope {
 public:
  DeviceScope(const Backend& backend, int device)
      : backend_(backend), device_(device), stream_(backend.enter(device, &previous_)) {}
  ~DeviceScope() { backend_.leave(device_, previous_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  void* stream() const { return stream_; }

 private:
  const Backend& backend_;
  int device_, previous_ = 0;
  void* stream_;
};

ForwardParams& problem(ForwardParams& params) { return params; }
ForwardParams& problem(BackwardParams& params) { return params.forward; }

template <typename Params>
void run(const std::vector<const Kernel<Params>*>& kernels, const Backend& backend, Params& params,
         const TensorInfo& like) {
  ForwardParams& p = problem(params);
  const DeviceInfo info = backend.device_info(p.device_index);
  const Kernel<Params>& kernel = select_kernel(kernels, params, info);
  const Plan plan = kernel.plan(params, info);
  OptionalTensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = empty_contiguous(1, &plan.workspace_bytes, DType::kOther, like, "the kernel's workspace");
    p.workspace = workspace->data_ptr();
  }
  const DeviceScope scope(backend, p.device_index);
  kernel.launch(params, info, scope.stream());
}

Tensor empty_lse(const ForwardParams& p, const TensorInfo& like) {
  const DType dtype = statistics_dtype(p.dtype);
  const int64_t dense[] = {p.batch, p.num_heads, p.seqlen_q}, packed[] = {p.num_heads, p.total_q};
  return p.is_varlen_q() ? empty_contiguous(2, packed, dtype, like, "lse")
                         : empty_contiguous(3, dense, dtype, like, "lse");
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor attn_mask, OptionalTensor alibi_slopes,
                                   OptionalTensor sinks, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                   OptionalTensor seqused_q, OptionalTensor seqused_k, OptionalTensor rng_state,
                                   int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> softmax_scale,
                                   int64_t causal, int64_t window_left, int64_t window_right, double softcap,
                                   double dropout_p, bool heads_first, bool deterministic) {
  const Inputs inputs(q, k, v, attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
                      rng_state, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap,
                      dropout_p, heads_first, deterministic);
  ForwardParams params = make_forward_params(inputs.arguments);
  const Backend& backend = backend_of(params);
  Tensor out = empty_like_dense(inputs.q_given, params.head_dim_v, "out");
  Tensor lse = empty_lse(params, inputs.q_given);
  params.out = tensor_view(info_of(out, "out"), heads_first);
  params.lse = row_view(info_of(lse, "lse"));
  if (lse.numel() > 0) run(backend.forward, backend, params, inputs.q_given);
  return {out, lse};
}

void check_saved(const char* name, const TensorInfo& tensor, const TensorInfo& expected) {
  bool same = tensor.ndim == expected.ndim && tensor.dtype == expected.dtype && tensor.device == expected.device &&
              tensor.device_index == expected.device_index;
  for (int i = 0; same && i < tensor.ndim; ++i) same = tensor.size[i] == expected.size[i];
  if (!same) {
    throw std::runtime_error(std::string(name) + " must have shape " + shape_string(expected) + ", dtype " +
                             dtype_name(expected.dtype) + " and q's device, but has " + shape_string(tensor) +
                             " and dtype " + dtype_name(tensor.dtype));
  }
}

TensorInfo expected_out(const TensorInfo& q, int64_t head_dim_v) {
  TensorInfo out = q;
  out.size[q.ndim - 1] = head_dim_v;
  return out;
}

TensorInfo expected_lse(const TensorInfo& q, const ForwardParams& p) {
  TensorInfo lse = q;
  lse.dtype = statistics_dtype(p.dtype);
  lse.ndim = p.is_varlen_q() ? 2 : 3;
  lse.size[0] = p.is_varlen_q() ? p.num_heads : p.batch;
  lse.size[1] = p.is_varlen_q() ? p.total_q : p.num_heads;
  lse.size[2] = p.seqlen_q;
  return lse;
}

/// The gradients, in the order of `needs`: q, k, v, attn_mask, alibi_slopes, sinks.
struct Gradients {
  OptionalTensor dq, dk, dv, dmask, dslopes, dsinks;

  Gradients(const Inputs& inputs, const std::vector<bool>& needs, BackwardParams& params) {
    const ForwardParams& p = params.forward;
    const Arguments& a = inputs.arguments;
    const DType statistics = statistics_dtype(p.dtype);
    const auto like_input = [&](const TensorInfo& given, const char* name, TensorView& view) {
      Tensor gradient = empty_like_dense(given, given.size[given.ndim - 1], name);
      view = tensor_view(info_of(gradient, name), a.heads_first);
      return gradient;
    };
    if (needs[0]) dq = like_input(inputs.q_given, "dq", params.dq);
    if (needs[1]) dk = like_input(inputs.k_given, "dk", params.dk);
    if (needs[2]) dv = like_input(inputs.v_given, "dv", params.dv);
    const auto contiguous = [&](const TensorInfo& given, const char* name, void*& data) {
      Tensor gradient = empty_contiguous(given.ndim, given.size, statistics, inputs.q_given, name);
      data = gradient.data_ptr();
      return gradient;
    };
    if (needs[3]) {
      if (!a.attn_mask || a.attn_mask->dtype == DType::kBool) {
        throw std::runtime_error("attn_mask must be a floating-point tensor to have a gradient");
      }
      dmask = contiguous(*a.attn_mask, "the gradient of attn_mask", params.dmask);
    }
    if (needs[4]) {
      if (!a.alibi_slopes) throw std::runtime_error("alibi_slopes must be given to have a gradient, but is None");
      dslopes = contiguous(*a.alibi_slopes, "the gradient of alibi_slopes", params.dslopes);
      params.slopes_have_batch = a.alibi_slopes->ndim == 2;
    }
    if (needs[5]) {
      if (!a.sinks) throw std::runtime_error("sinks must be given to have a gradient, but is None");
      dsinks = contiguous(*a.sinks, "the gradient of sinks", params.dsinks);
    }
  }

  void zero() {
    for (OptionalTensor* gradient : {&dq, &dk, &dv, &dmask, &dslopes, &dsinks}) {
      if (*gradient) torch::stable::zero_(**gradient);
    }
  }
};

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, OptionalTensor attn_mask,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor seqused_q, OptionalTensor seqused_k, OptionalTensor rng_state, Tensor out, Tensor lse,
    std::vector<bool> needs, int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> softmax_scale,
    int64_t causal, int64_t window_left, int64_t window_right, double softcap, double dropout_p, bool heads_first,
    bool deterministic) {
  const Inputs inputs(q, k, v, attn_mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
                      rng_state, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap,
                      dropout_p, heads_first, deterministic);
  if (needs.size() != 6) {
    throw std::runtime_error("needs must have 6 entries (q, k, v, attn_mask, alibi_slopes, sinks), but has " +
                             std::to_string(needs.size()));
  }
  BackwardParams params;
  params.forward = make_forward_params(inputs.arguments);
  ForwardParams& p = params.forward;
  const Backend& backend = backend_of(p);

  const TensorInfo out_expected = expected_out(inputs.q_given, p.head_dim_v);
  const TensorInfo lse_expected = expected_lse(inputs.q_given, p);
  TensorInfo dout_info = info_of(dout, "dout"), out_info = info_of(out, "out");
  const TensorInfo lse_info = info_of(lse, "lse");
  check_saved("dout", dout_info, out_expected);
  check_saved("out", out_info, out_expected);
  check_saved("lse", lse_info, lse_expected);
  make_unit_stride(dout, dout_info, "dout");
  make_unit_stride(out, out_info, "out");
  params.dout = tensor_view(dout_info, heads_first);
  p.out = tensor_view(out_info, heads_first);
  p.lse = row_view(lse_info);
  if (dlse) {
    const TensorInfo dlse_info = info_of(*dlse, "dlse");
    check_saved("dlse", dlse_info, lse_expected);
    params.dlse = row_view(dlse_info);
  }

  Gradients gradients(inputs, needs, params);
  if (lse.numel() == 0 || p.batch == 0) {
    gradients.zero();
  } else {
    run(backend.backward, backend, params, inputs.q_given);
  }
  if (gradients.dmask && attn_mask->scalar_type() != gradients.dmask->scalar_type()) {
    gradients.dmask = torch::stable::to(*gradients.dmask, attn_mask->scalar_type());
  }
  return {gradients.dq, gradients.dk, gradients.dv, gradients.dmask, gradients.dslopes, gradients.dsinks};
}

}  // namespace

}  // namespace flash_attn

#define FLASH_ATTN_TENSORS                                                                                       \
  "Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q, " \
  "Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? rng_state"
#define FLASH_ATTN_OPTIONS                                                                           \
  "SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, int causal, SymInt window_left, " \
  "SymInt window_right, float softcap, float dropout_p, bool heads_first, bool deterministic"

STABLE_TORCH_LIBRARY(flash_attn, m) {
  m.def("forward(" FLASH_ATTN_TENSORS ", " FLASH_ATTN_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("backward(Tensor dout, Tensor? dlse, " FLASH_ATTN_TENSORS
        ", Tensor out, Tensor lse, bool[] needs, " FLASH_ATTN_OPTIONS
        ") -> (Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask, Tensor? dslopes, Tensor? dsinks)");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CPU, m) {
  m.impl("forward", TORCH_BOX(&flash_attn::forward));
  m.impl("backward", TORCH_BOX(&flash_attn::backward));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
  m.impl("forward", TORCH_BOX(&flash_attn::forward));
  m.impl("backward", TORCH_BOX(&flash_attn::backward));
}
