#include "extension.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "torch/below_autograd.h"

namespace flash_attn {
namespace {

using torch::stable::detail::StableLibrary;

constexpr int64_t kMark = 0x666c6173;  // the result max_q: who called sees that the kernel was ours

/// The op has no argument for our options, but hands dropout_p on to backward: -1 - options - what is dropped, which is
/// less than 1. Nobody else calls with less than 0.
PlainOptions set_carried(Inputs& inputs, std::optional<double> scale, double dropout_p) {
  if (!(dropout_p <= -1)) {
    throw std::runtime_error(
        "aten::_scaled_dot_product_fused_attention_overrideable: the kernel of flash_attn takes calls of flash_attn "
        "alone");
  }
  const double carried = -1 - dropout_p, options = std::floor(carried);
  inputs.options().dropout_p = carried - options;
  return inputs.set_plain_options(scale, int64_t(options));
}

// (Tensor query, Tensor key, Tensor value, Tensor? attn_bias, float dropout_p, bool is_causal, bool return_debug_mask,
//  *, float? scale) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt
//  max_k, Tensor philox_seed, Tensor philox_offset, Tensor debug_attn_mask)
void forward_of_extension(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Inputs inputs;
  inputs.take_plain_tensors(stack);
  auto mask = stack.take<OptionalTensor>();
  const double dropout_p = stack.take<double>();
  stack.take<bool>();
  stack.take<bool>();
  const auto scale = stack.take<std::optional<double>>();
  const PlainOptions options = set_carried(inputs, scale, dropout_p);
  inputs.set_mask(std::move(mask));
  inputs.describe();

  PlainResults results = attend_plain(inputs, options);
  put_results(values, std::move(results.out), std::move(results.lse), Tensor(), Tensor(), kMark, int64_t{0},
              std::move(results.rng_state), Tensor(), Tensor());
}

// (Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor attn_bias, bool[4] grad_input_mask, Tensor out,
//  Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal,
//  Tensor philox_seed, Tensor philox_offset, *, float? scale) -> (Tensor grad_query, Tensor grad_key, Tensor
//  grad_value, Tensor grad_attn_bias)
void differentiate(StableIValue* values) {
  Stack stack(values);
  Inputs inputs;
  Tensor dout = stack.take<Tensor>();
  inputs.take_plain_tensors(stack);
  auto mask = stack.take<Tensor>();
  auto needs = stack.take<std::vector<bool>>();
  Tensor out = stack.take<Tensor>();
  const Tensor lse = stack.take<Tensor>();
  for (int i = 0; i < 2; ++i) stack.take<Tensor>();
  for (int i = 0; i < 2; ++i) stack.take<int64_t>();
  const double dropout_p = stack.take<double>();
  stack.take<bool>();
  auto rng_state = stack.take<Tensor>();
  stack.take<Tensor>();
  const auto scale = stack.take<std::optional<double>>();
  if (!dout.is_defined()) return put_results(values, Tensor(), Tensor(), Tensor(), Tensor());  // zero, to autograd
  set_carried(inputs, scale, dropout_p);
  const Tensor trained = needs.at(3) ? Tensor(mask.shared()) : Tensor();
  inputs.set_mask(std::move(mask));
  inputs.describe();
  if (inputs.arguments().dropout_p > 0) inputs.set_rng_state(std::move(rng_state));

  needs.resize(Arguments::kDifferentiable);
  auto [dq, dk, dv, dmask] = differentiate_plain(inputs, dout, out, lse, needs);
  // Compiled autograd has been told so by torch's fake kernel.
  if (needs[3]) dmask = laid_out_like(std::move(dmask), trained);
  put_results(values, std::move(dq), std::move(dk), std::move(dv), std::move(dmask));
}

/// What went wrong in a call that torch answers by a code.
thread_local std::exception_ptr failure;

void backward_of_extension(StableIValue* values, uint64_t, uint64_t) try { differentiate(values); } catch (...) {
  failure = std::current_exception();
  throw;
}

constexpr const char* kBackward = "_scaled_dot_product_fused_attention_overrideable_backward";

/// Torch has no derivative of the op's derivative: where one may be asked for, an op that has one takes its place.
/// (flash_attn/torch_op/extension.py; the same schema.)
void with_derivative(StableIValue* values, const char* key) {
  const bool is_differentiated = aoti_torch_grad_mode_is_enabled();
  std::optional<BelowAutograd> below;
  if (!is_differentiated) below.emplace(key);
  static const std::string torchs = std::string("aten::") + kBackward;
  const char* const op = is_differentiated ? "flash_attn::backward_of_extension" : torchs.c_str();
  failure = nullptr;
  if (torch_call_dispatcher(op, "", values, TORCH_ABI_VERSION) == 0) return;
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  throw std::runtime_error(std::string(op) + " failed, and torch has printed why");
}

void cpu_with_derivative(StableIValue* values, uint64_t, uint64_t) { with_derivative(values, "AutogradCPU"); }
void cuda_with_derivative(StableIValue* values, uint64_t, uint64_t) { with_derivative(values, "AutogradCUDA"); }

std::unique_ptr<StableLibrary> derivatives_for(const std::string& device) {
  const std::string key = "Autograd" + device;
  auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", key.c_str(), __FILE__, __LINE__);
  library->impl(kBackward, device == "CPU" ? &cpu_with_derivative : &cuda_with_derivative);
  return library;
}

std::unique_ptr<StableLibrary> kernels_for(const char* device) {
  auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", device, __FILE__, __LINE__);
  library->impl("_scaled_dot_product_fused_attention_overrideable", &forward_of_extension);
  library->impl(kBackward, &backward_of_extension);
  return library;
}

}  // namespace
}  // namespace flash_attn

void flash_attn_extend(const char* device) {
  static std::vector<std::unique_ptr<flash_attn::StableLibrary>> libraries;  // what they register lives as long
  libraries.push_back(flash_attn::kernels_for(device));
  if (flash_attn::can_go_below_autograd()) libraries.push_back(flash_attn::derivatives_for(device));
}
