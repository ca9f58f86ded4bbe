// One implementation of the ops for every device: check, plan, allocate, launch.
#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../select_kernel.h"
#include "refuse.h"
#include "stack.h"

namespace flash_attn {

namespace {

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

void check_saved(const char* name, const TensorInfo& tensor, const TensorInfo& expected) {
  bool same = tensor.ndim == expected.ndim && tensor.dtype == expected.dtype && tensor.device == expected.device &&
              tensor.device_index == expected.device_index;
  for (int i = 0; same && i < tensor.ndim; ++i) same = tensor.size[i] == expected.size[i];
  if (!same) {
    refuse(name, " must have shape ", shape_string(expected), ", dtype ", dtype_name(expected.dtype),
           " and q's device, but has ", shape_string(tensor), " and dtype ", dtype_name(tensor.dtype));
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

/// What the forward pass returned, and the gradients of that.
void fill_saved(const Inputs& inputs, Tensor& dout, const OptionalTensor& dlse, Tensor& out, const Tensor& lse,
                BackwardParams& params) {
  ForwardParams& p = params.forward;
  const bool heads_first = inputs.arguments().heads_first;
  const TensorInfo out_expected = expected_out(inputs.q_given(), p.head_dim_v);
  const TensorInfo lse_expected = expected_lse(inputs.q_given(), p);
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
}

/// The gradients, in the order of `needs`: q, k, v, attn_mask, alibi_slopes, sinks.
struct Gradients {
  OptionalTensor dq, dk, dv, dmask, dslopes, dsinks;

  Gradients(const Inputs& inputs, const std::vector<bool>& needs, BackwardParams& params) {
    const ForwardParams& p = params.forward;
    const Arguments& a = inputs.arguments();
    const DType statistics = statistics_dtype(p.dtype);
    const auto like_input = [&](const TensorInfo& given, const char* name, TensorView& view) {
      Tensor gradient = empty_like_dense(given, given.size[given.ndim - 1], name);
      view = tensor_view(info_of(gradient, name), a.heads_first);
      return gradient;
    };
    if (needs[0]) dq = like_input(inputs.q_given(), "dq", params.dq);
    if (needs[1]) dk = like_input(inputs.k_given(), "dk", params.dk);
    if (needs[2]) dv = like_input(inputs.v_given(), "dv", params.dv);
    const auto contiguous = [&](const TensorInfo& given, const char* name, void*& data) {
      Tensor gradient = empty_contiguous(given.ndim, given.size, statistics, inputs.q_given(), name);
      data = gradient.data_ptr();
      return gradient;
    };
    if (needs[3]) {
      if (!a.attn_mask || a.attn_mask->dtype == DType::kBool) {
        refuse("attn_mask must be a floating-point tensor to have a gradient");
      }
      dmask = contiguous(*a.attn_mask, "the gradient of attn_mask", params.dmask);
    }
    if (needs[4]) {
      if (!a.alibi_slopes) refuse("alibi_slopes must be given to have a gradient, but is None");
      dslopes = contiguous(*a.alibi_slopes, "the gradient of alibi_slopes", params.dslopes);
      params.slopes_have_batch = a.alibi_slopes->ndim == 2;
    }
    if (needs[5]) {
      if (!a.sinks) refuse("sinks must be given to have a gradient, but is None");
      dsinks = contiguous(*a.sinks, "the gradient of sinks", params.dsinks);
    }
  }

  /// To the caller's dtype.
  void convert_dmask(const Arguments& arguments) {
    if (dmask) dmask = converted(*dmask, arguments.attn_mask->dtype);
  }

  void zero() {
    for (OptionalTensor* gradient : {&dq, &dk, &dv, &dmask, &dslopes, &dsinks}) {
      if (*gradient) torch::stable::zero_(**gradient);
    }
  }
};

}  // namespace

void forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Inputs inputs;
  inputs.take_tensors(stack);
  inputs.take_options(stack);
  inputs.describe();

  ForwardParams params = make_forward_params(inputs.arguments());
  const Backend& backend = backend_of(params.device);
  const Tensor out = empty_like_dense(inputs.q_given(), params.head_dim_v, "out");
  const Tensor lse = empty_lse(params, inputs.q_given());
  params.out = tensor_view(info_of(out, "out"), inputs.arguments().heads_first);
  params.lse = row_view(info_of(lse, "lse"));
  if (lse.numel() > 0) run(backend.forward, backend, params, inputs.q_given());
  put_results(values, out, lse);
}

void backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Inputs inputs;
  Tensor dout = stack.take<Tensor>();
  const OptionalTensor dlse = stack.take<OptionalTensor>();
  inputs.take_tensors(stack);
  Tensor out = stack.take<Tensor>();
  const Tensor lse = stack.take<Tensor>();
  const auto needs = stack.take<std::vector<bool>>();
  inputs.take_options(stack);
  inputs.describe();

  const Arguments& arguments = inputs.arguments();
  if (needs.size() != Arguments::kDifferentiable) {
    refuse("needs must have 6 entries (q, k, v, attn_mask, alibi_slopes, sinks), but has ", needs.size());
  }
  BackwardParams params;
  params.forward = make_forward_params(arguments);
  fill_saved(inputs, dout, dlse, out, lse, params);
  const Backend& backend = backend_of(params.forward.device);
  Gradients gradients(inputs, needs, params);
  if (lse.numel() == 0 || params.forward.batch == 0) {
    gradients.zero();
  } else {
    run(backend.backward, backend, params, inputs.q_given());
  }
  gradients.convert_dmask(arguments);
  put_results(values, gradients.dq, gradients.dk, gradients.dv, gradients.dmask, gradients.dslopes, gradients.dsinks);
}

}  // namespace flash_attn
