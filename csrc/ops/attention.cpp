// One implementation of the ops for every device: check, plan, allocate, launch.
#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <utility>
#include <vector>

#include "../mask_kind.h"
#include "arguments/refuse.h"
#include "rng_state.h"
#include "run.h"

namespace flash_attn {

namespace {

/// What the forward pass returned, and the gradients of that.
void fill_saved(const Arguments& arguments, Tensor& dout, const OptionalTensor& dlse, Tensor& out, const Tensor& lse,
                const std::vector<bool>& needs, BackwardParams& params) {
  Saved saved{info_of(dout, "dout"), std::nullopt, info_of(out, "out"), info_of(lse, "lse"), needs};
  if (dlse) saved.dlse = info_of(*dlse, "dlse");
  check_saved(arguments, params.forward, saved);
  make_unit_stride(dout, saved.dout, "dout");
  make_unit_stride(out, saved.out, "out");
  params.dout = tensor_view(saved.dout, arguments.heads_first);
  params.forward.out = tensor_view(saved.out, arguments.heads_first);
  params.forward.lse = row_view(saved.lse);
  if (saved.dlse) params.dlse = row_view(*saved.dlse);
}

Gradients empty_gradients(const Inputs& inputs, const std::vector<bool>& needs, BackwardParams& params) {
  const Arguments& a = inputs.arguments();
  Gradients gradients;
  const auto like_input = [&](const TensorInfo& given, const char* name, TensorView& view) {
    NewTensor gradient = empty_like_dense(given, given.size[given.ndim - 1], name);
    view = tensor_view(gradient.info, a.heads_first);
    return std::move(gradient.tensor);
  };
  if (needs[0]) gradients.dq = like_input(inputs.q_given(), "dq", params.dq);
  if (needs[1]) gradients.dk = like_input(inputs.k_given(), "dk", params.dk);
  if (needs[2]) gradients.dv = like_input(inputs.v_given(), "dv", params.dv);
  const DType statistics = statistics_dtype(params.forward.dtype);
  const auto contiguous = [&](const TensorInfo& given, const char* name, void*& data) {
    NewTensor gradient = empty_contiguous(given.ndim, given.size, statistics, inputs.q_given(), name);
    data = gradient.info.data;
    return std::move(gradient.tensor);
  };
  if (needs[4]) {
    gradients.dslopes = contiguous(*a.alibi_slopes, "the gradient of alibi_slopes", params.dslopes);
    params.slopes_have_batch = a.alibi_slopes->ndim == 2;
  }
  if (needs[5]) gradients.dsinks = contiguous(*a.sinks, "the gradient of sinks", params.dsinks);
  return gradients;
}

void zero(Gradients& g) {
  for (OptionalTensor* gradient : {&g.dq, &g.dk, &g.dv, &g.dmask, &g.dslopes, &g.dsinks}) {
    if (!*gradient) continue;
    torch::stable::Tensor zeros = (*gradient)->shared();
    torch::stable::zero_(zeros);
  }
}

constexpr const char* kDmask = "the gradient of attn_mask";

/// For the gradient of attn_mask, not yet filled.
NewTensor empty_like_mask(const Inputs& inputs, DType dtype) {
  const TensorInfo& mask = *inputs.arguments().attn_mask;
  return empty_contiguous(mask.ndim, mask.size, dtype, inputs.q_given(), kDmask);
}

/// Where kernels add up the gradient of a 16-bit attn_mask, in float32; then it is rounded to `rounded`.
struct DmaskScratch {
  const Backend& backend;
  BackwardParams& params;
  const NewTensor& rounded;
  int64_t count, bytes = count * int64_t{sizeof(float)};
  void place(void* data) const { params.dmask = data; }
  void after(void* stream) const {
    backend.round(static_cast<const float*>(params.dmask), rounded.info.data, rounded.info.dtype, count, stream);
  }
};

/// Runs the kernel where the gradient of attn_mask is wanted, and returns that in the mask's dtype.
Tensor run_with_dmask(const Backend& backend, BackwardParams& params, const Inputs& inputs) {
  const TensorInfo& mask = *inputs.arguments().attn_mask;
  const DType statistics = statistics_dtype(params.forward.dtype);
  const bool rounds = backend.round != nullptr && statistics == DType::kFloat32 &&
                      (mask.dtype == DType::kBFloat16 || mask.dtype == DType::kFloat16);
  NewTensor dmask = empty_like_mask(inputs, rounds ? mask.dtype : statistics);
  params.dmask = dmask.info.data;
  if (!rounds) {
    run(backend.backward, backend, params, inputs.q_given());
    return converted(std::move(dmask.tensor), mask.dtype, kDmask);
  }
  const DmaskScratch scratch{backend, params, dmask, dmask.tensor.numel()};
  run(backend.backward, backend, params, inputs.q_given(), scratch);
  return std::move(dmask.tensor);
}

Tensor packed(const TensorInfo& mask) {
  if (mask.ndim != 4) {
    refuse("mask must be (batch | 1, heads | 1, seqlen_q | 1, seqlen_k | 1), but has shape ", shape_string(mask));
  }
  if (mask.dtype == DType::kInt32 || mask.dtype == DType::kInt64 || mask.dtype == DType::kOther) {
    refuse("mask must be bool, float64, float32, bfloat16 or float16, but is ", dtype_name(mask.dtype));
  }
  const MaskView view = mask_view(mask);
  const int64_t words = mask::stored_bytes(view) / 8;
  NewTensor result = empty_contiguous(1, &words, DType::kInt64, mask, "the packed mask");
  if (words == 0) return std::move(result.tensor);
  const Backend& backend = backend_of(mask.device);
  const DeviceScope scope(backend, mask.device_index);
  backend.pack_mask(view, result.info.data, scope.stream());
  return std::move(result.tensor);
}

}  // namespace

Results attend(const Inputs& inputs, bool lse_is_read, const Tensor* lse) {
  ForwardParams params = make_forward_params(inputs.arguments());
  const Backend& backend = backend_of(params.device);
  Results results = empty_results(params, inputs.q_given(), inputs.arguments().heads_first, lse_is_read, lse);
  if (params.total_q * params.num_heads > 0) run(backend.forward, backend, params, inputs.q_given());
  return results;
}

Gradients differentiate(const Inputs& inputs, Tensor& dout, const OptionalTensor& dlse, Tensor& out, const Tensor& lse,
                        const std::vector<bool>& needs) {
  const Arguments& arguments = inputs.arguments();
  BackwardParams params;
  params.forward = make_forward_params(arguments);
  fill_saved(arguments, dout, dlse, out, lse, needs, params);
  if (needs[3]) keep_shape_of_mask(arguments, params.forward);
  const Backend& backend = backend_of(params.forward.device);
  Gradients gradients = empty_gradients(inputs, needs, params);
  if (lse.numel() == 0 || params.forward.batch == 0) {
    if (needs[3]) gradients.dmask = empty_like_mask(inputs, arguments.attn_mask->dtype).tensor;
    zero(gradients);
  } else if (needs[3]) {
    gradients.dmask = run_with_dmask(backend, params, inputs);
  } else {
    run(backend.backward, backend, params, inputs.q_given());
  }
  return gradients;
}

void forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Inputs inputs;
  inputs.take_tensors(stack);
  inputs.take_options(stack);
  inputs.describe();

  Results results = attend(inputs);
  const bool drops = inputs.arguments().dropout_p > 0.0;
  Tensor rng_used = drops ? Tensor(torch::stable::clone(inputs.rng_state()->shared())) : Tensor();
  put_results(values, std::move(results.out), std::move(results.lse), std::move(rng_used));
}

PlainResults attend_plain(Inputs& inputs, const PlainOptions& options) {
  PlainResults plain;
  if (options.if_they_fit && !fit_as_they_are(inputs.arguments(), options.shared_heads)) return plain;
  if (inputs.arguments().dropout_p > 0) {
    plain.rng_state = drawn_rng_state(inputs.q_given());
    inputs.set_rng_state(Tensor(plain.rng_state.shared()));
  }
  Results results = attend(inputs, options.lse_is_read);
  plain.out = std::move(results.out);
  if (options.lse_is_read) plain.lse = std::move(results.lse);
  return plain;
}

std::array<Tensor, 4> differentiate_plain(const Inputs& inputs, Tensor& dout, Tensor& out, const Tensor& lse,
                                          const std::vector<bool>& needs) {
  Gradients gradients = differentiate(inputs, dout, std::nullopt, out, lse, needs);
  const auto defined = [](OptionalTensor& gradient) { return gradient ? std::move(*gradient) : Tensor(); };
  return {defined(gradients.dq), defined(gradients.dk), defined(gradients.dv), defined(gradients.dmask)};
}

void plain_forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Inputs inputs;
  inputs.take_plain_tensors(stack);
  const PlainOptions options = inputs.take_plain_options(stack);
  inputs.describe();

  PlainResults results = attend_plain(inputs, options);
  put_results(values, std::move(results.out), std::move(results.lse));
}

void masked_forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Inputs inputs;
  inputs.take_plain_tensors(stack);
  auto mask = stack.take<Tensor>();
  const PlainOptions options = inputs.take_plain_options(stack);
  inputs.set_mask(std::move(mask));
  inputs.describe();

  PlainResults results = attend_plain(inputs, options);
  put_results(values, std::move(results.out), std::move(results.lse));
}

void pack_mask(StableIValue* values, uint64_t, uint64_t) {
  const Tensor mask = Stack(values).take<Tensor>();
  put_results(values, packed(info_of(mask, "mask")));
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

  Gradients g = differentiate(inputs, dout, dlse, out, lse, needs);
  put_results(values, std::move(g.dq), std::move(g.dk), std::move(g.dv), std::move(g.dmask), std::move(g.dslopes),
              std::move(g.dsinks));
}

void plain_backward(StableIValue* values, uint64_t, uint64_t) {
  static const std::vector<bool> kNeeds{true, true, true, false, false, false};
  Stack stack(values);
  Inputs inputs;
  Tensor dout = stack.take<Tensor>();
  inputs.take_plain_tensors(stack);
  Tensor out = stack.take<Tensor>();
  const Tensor lse = stack.take<Tensor>();
  inputs.take_plain_options(stack);
  inputs.describe();

  auto [dq, dk, dv, dmask] = differentiate_plain(inputs, dout, out, lse, kNeeds);
  put_results(values, std::move(dq), std::move(dk), std::move(dv));
}

}  // namespace flash_attn
