// Torch's fused kernels have an op each, with a derivative in C++ that calls the op's `_backward`. Which of them a call
// gets is torch's choice. Ours under them differ in the schema, and in what torch's fake kernels promise to compiled
// code of the results: sizes and strides of out, lse and the gradients.
#include "override.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arguments/refuse.h"
#include "attention.h"
#include "rng_state.h"
#include "torch/deterministic.h"

namespace flash_attn {
namespace {

using torch::stable::detail::StableLibrary;

enum class Of { kFlash, kEfficient, kCudnn, kCpu };

/// What an op takes, in whichever order.
struct Call {
  const Of op;
  Inputs inputs;
  OptionalTensor mask;
  std::optional<double> scale;
  double dropout_p = 0.0;
  bool is_causal = false, return_debug_mask = false;
  bool drops() const { return dropout_p > 0.0; }

  explicit Call(Of of) : op(of) {}

  /// To be called once everything is taken. The ops have no argument for torch's switch for gradients that repeat.
  void describe() {
    Arguments& options = inputs.options();
    options.softmax_scale = scale;
    options.causal = is_causal ? 1 : 0;
    options.dropout_p = dropout_p;
    options.heads_first = true;
    options.deterministic = deterministic_algorithms_enabled();
    inputs.set_mask(std::move(mask));
    inputs.describe();
    if (return_debug_mask) refuse("return_debug_mask must be False: no kernel of flash_attn stores what dropout drew");
  }

  Tensor empty(std::initializer_list<int64_t> sizes, DType dtype, const char* name) const {
    return empty_contiguous(int(sizes.size()), sizes.begin(), dtype, inputs.q_given(), name).tensor;
  }
};

/// What an op's `_backward` takes.
struct BackwardCall : Call {
  Tensor dout, out, lse;
  std::array<Tensor, 2> drawn;  // seed and offset; the flash op has its state in the first

  BackwardCall(Of of, Stack& stack) : Call(of) {
    dout = stack.take<Tensor>();
    inputs.take_plain_tensors(stack);
    if (of == Of::kEfficient) mask = stack.take<Tensor>();
    out = stack.take<Tensor>();
    lse = stack.take<Tensor>();
  }
  void take_drawn(Stack& stack) {
    for (Tensor& number : drawn) number = stack.take<Tensor>();
  }
  /// Starts and longest of packed sequences, which these are not.
  static void skip_lengths(Stack& stack) {
    for (int i = 0; i < 2; ++i) stack.take<Tensor>();
    for (int i = 0; i < 2; ++i) stack.take<int64_t>();
  }
};

/// Logarithms of the sums of rows, as an op returns them.
Tensor empty_lse(const Call& call) {
  const TensorInfo& q = call.inputs.arguments().q;
  const DType dtype = q.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t batch = q.size[0], heads = q.size[1], rows = q.size[2];
  switch (call.op) {
    case Of::kEfficient: return call.empty({batch, heads, (rows + 31) / 32 * 32}, dtype, "lse");
    case Of::kCudnn: return call.empty({batch, heads, rows, 1}, dtype, "lse");
    case Of::kCpu:
      return view_of(call.empty({batch, rows, heads}, dtype, "lse"), {batch, heads, rows}, {heads * rows, 1, heads});
    case Of::kFlash: break;
  }
  return call.empty({batch, heads, rows}, dtype, "lse");
}

/// (batch, heads, seqlen_q), where the kernels write and read them.
Tensor rows_of_lse(const Call& call, const Tensor& lse) {
  const TensorInfo& q = call.inputs.arguments().q;
  const TensorInfo l = info_of(lse, "logsumexp");
  return view_of(lse, {q.size[0], q.size[1], q.size[2]}, {l.stride[0], l.stride[1], l.stride[2]});
}

void copy(const Tensor& to, const Tensor& from) {
  torch::stable::Tensor destination = to.shared();
  torch::stable::copy_(destination, from.shared());
}

/// A tensor of one number each.
std::array<Tensor, 2> halves(const Tensor& state) { return {view_of(state, {}, {}, 0), view_of(state, {}, {}, 1)}; }

void copy(const std::array<Tensor, 2>& to, const std::array<Tensor, 2>& from) {
  for (int i = 0; i < 2; ++i) copy(to[i], from[i]);
}

/// The state as ops return it that have two numbers for it: in tensors of their own, as compiled code expects that what
/// it saves begins at a multiple of 16 bytes.
std::array<Tensor, 2> seed_and_offset(const Call& call, const Tensor& state) {
  std::array<Tensor, 2> numbers{call.empty({}, DType::kInt64, "the seed of dropout"),
                                call.empty({}, DType::kInt64, "the offset of dropout")};
  if (call.drops()) copy(numbers, halves(state));
  return numbers;
}

struct Outcome {
  Tensor out, lse;
  Tensor state;  // what dropout was drawn from; without it never read, but the flash op's derivative saves one
};

Outcome attend(Call& call, bool lse_is_read = true) {
  call.describe();
  Outcome outcome;
  if (call.drops()) {
    outcome.state = drawn_rng_state(call.inputs.q_given());
    call.inputs.set_rng_state(view_of(outcome.state, {2}, {1}));
  } else if (call.op == Of::kFlash) {
    outcome.state = call.empty({2}, DType::kInt64, "the state of dropout");
  }
  if (call.op == Of::kEfficient) call.inputs.lay_results_out_by_rows();
  if (lse_is_read) {
    outcome.lse = empty_lse(call);
    const Tensor rows = rows_of_lse(call, outcome.lse);
    outcome.out = attend(call.inputs, true, &rows).out;
  } else {
    const TensorInfo& q = call.inputs.arguments().q;
    outcome.lse = call.empty({q.size[0], q.size[1], 0}, DType::kFloat32, "lse");
    outcome.out = attend(call.inputs, false).out;
  }
  return outcome;
}

/// What `attend` drew, from what the op returned of it. Two tensors may lie anywhere by now.
Tensor state_of(BackwardCall& call) {
  if (call.op == Of::kFlash) return std::move(call.drawn[0]);
  Tensor state = call.empty({2}, DType::kInt64, "the state of dropout");
  copy(halves(state), call.drawn);
  return state;
}

Gradients differentiate(BackwardCall& call, bool needs_mask = false) {
  if (!call.dout.is_defined()) return {Tensor(), Tensor(), Tensor(), {}, {}, {}};  // zero, to autograd
  call.describe();
  if (call.drops()) call.inputs.set_rng_state(state_of(call));
  if (call.op == Of::kEfficient || call.op == Of::kCpu) call.inputs.lay_results_out_by_rows();
  const std::vector<bool> needs{true, true, true, needs_mask, false, false};
  return differentiate(call.inputs, call.dout, std::nullopt, call.out, rows_of_lse(call, call.lse), needs);
}

/// Torch's kernel lays a mask's gradient out by rows of a multiple of 16 numbers.
Tensor with_aligned_rows(const Call& call, OptionalTensor& gradient) {
  if (!gradient) return Tensor();
  const TensorInfo& m = *call.inputs.arguments().attn_mask;
  if (m.size[3] % 16 == 0) return std::move(*gradient);
  const int64_t row = (m.size[3] + 15) / 16 * 16, head = row * m.size[2];
  const Tensor whole =
      call.empty({m.size[0], m.size[1], m.size[2], row}, m.dtype, "the gradient of attn_mask with aligned rows");
  Tensor aligned = view_of(whole, {m.size[0], m.size[1], m.size[2], m.size[3]}, {head * m.size[1], head, row, 1});
  copy(aligned, *gradient);
  return aligned;
}

// _scaled_dot_product_flash_attention(Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal,
//   bool return_debug_mask, *, float? scale) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k,
//   SymInt max_q, SymInt max_k, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)
void flash_forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Call call(Of::kFlash);
  call.inputs.take_plain_tensors(stack);
  call.dropout_p = stack.take<double>();
  call.is_causal = stack.take<bool>();
  call.return_debug_mask = stack.take<bool>();
  call.scale = stack.take<std::optional<double>>();

  auto [out, lse, state] = attend(call);
  const TensorInfo &q = call.inputs.q_given(), &k = call.inputs.k_given();
  put_results(values, std::move(out), std::move(lse), Tensor(), Tensor(), q.size[2], k.size[2], std::move(state),
              call.empty({}, DType::kInt64, "what torch has unused"), call.empty({0}, q.dtype, "debug_attn_mask"));
}

// (Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q,
//  Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed,
//  Tensor philox_offset, *, float? scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)
void flash_backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  BackwardCall call(Of::kFlash, stack);
  call.skip_lengths(stack);
  call.dropout_p = stack.take<double>();
  call.is_causal = stack.take<bool>();
  call.take_drawn(stack);
  call.scale = stack.take<std::optional<double>>();

  Gradients g = differentiate(call);
  put_results(values, std::move(*g.dq), std::move(*g.dk), std::move(*g.dv));
}

// _scaled_dot_product_efficient_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_bias,
//   bool compute_log_sumexp, float dropout_p, bool is_causal, *, float? scale) -> (Tensor output, Tensor log_sumexp,
//   Tensor philox_seed, Tensor philox_offset)
void efficient_forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Call call(Of::kEfficient);
  call.inputs.take_plain_tensors(stack);
  call.mask = stack.take<OptionalTensor>();
  const bool lse_is_read = stack.take<bool>();
  call.dropout_p = stack.take<double>();
  call.is_causal = stack.take<bool>();
  call.scale = stack.take<std::optional<double>>();

  auto [out, lse, state] = attend(call, lse_is_read);
  auto [seed, offset] = seed_and_offset(call, state);
  put_results(values, std::move(out), std::move(lse), std::move(seed), std::move(offset));
}

// (Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor attn_bias, Tensor out, Tensor logsumexp,
//  Tensor philox_seed, Tensor philox_offset, float dropout_p, bool[4] grad_input_mask, bool is_causal, *, float? scale)
//  -> (Tensor, Tensor, Tensor, Tensor)
void efficient_backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  BackwardCall call(Of::kEfficient, stack);
  call.take_drawn(stack);
  call.dropout_p = stack.take<double>();
  const auto needs = stack.take<std::vector<bool>>();
  call.is_causal = stack.take<bool>();
  call.scale = stack.take<std::optional<double>>();

  Gradients g = differentiate(call, needs.at(3));
  Tensor dmask = with_aligned_rows(call, g.dmask);
  put_results(values, std::move(*g.dq), std::move(*g.dk), std::move(*g.dv), std::move(dmask));
}

// _scaled_dot_product_cudnn_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool
// compute_log_sumexp,
//   float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale) -> (Tensor output, Tensor logsumexp,
//   Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor philox_seed, Tensor philox_offset,
//   Tensor debug_attn_mask)
void cudnn_forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Call call(Of::kCudnn);
  call.inputs.take_plain_tensors(stack);
  call.mask = stack.take<OptionalTensor>();
  stack.take<bool>();
  call.dropout_p = stack.take<double>();
  call.is_causal = stack.take<bool>();
  call.return_debug_mask = stack.take<bool>();
  call.scale = stack.take<std::optional<double>>();

  auto [out, lse, state] = attend(call);
  auto [seed, offset] = seed_and_offset(call, state);
  const TensorInfo &q = call.inputs.q_given(), &k = call.inputs.k_given();
  put_results(values, std::move(out), std::move(lse), Tensor(), Tensor(), q.size[2], k.size[2], std::move(seed),
              std::move(offset), Tensor());
}

// (Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor philox_seed,
//  Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k,
//  float dropout_p, bool is_causal, *, float? scale) -> (Tensor, Tensor, Tensor)
void cudnn_backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  BackwardCall call(Of::kCudnn, stack);
  call.take_drawn(stack);
  call.mask = stack.take<Tensor>();
  call.skip_lengths(stack);
  call.dropout_p = stack.take<double>();
  call.is_causal = stack.take<bool>();
  call.scale = stack.take<std::optional<double>>();

  Gradients g = differentiate(call);
  put_results(values, std::move(*g.dq), std::move(*g.dk), std::move(*g.dv));
}

// _scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal,
// *,
//   Tensor? attn_mask, float? scale) -> (Tensor output, Tensor logsumexp)
void cpu_forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Call call(Of::kCpu);
  call.inputs.take_plain_tensors(stack);
  call.dropout_p = stack.take<double>();
  call.is_causal = stack.take<bool>();
  call.mask = stack.take<OptionalTensor>();
  call.scale = stack.take<std::optional<double>>();

  auto [out, lse, state] = attend(call);
  put_results(values, std::move(out), std::move(lse));
}

// (Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p,
//  bool is_causal, *, Tensor? attn_mask, float? scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)
void cpu_backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  BackwardCall call(Of::kCpu, stack);
  call.dropout_p = stack.take<double>();
  call.is_causal = stack.take<bool>();
  call.mask = stack.take<OptionalTensor>();
  call.scale = stack.take<std::optional<double>>();

  Gradients g = differentiate(call);
  put_results(values, std::move(*g.dq), std::move(*g.dk), std::move(*g.dv));
}

std::unique_ptr<StableLibrary> kernels_for(const std::string& device) {
  auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", device.c_str(), __FILE__, __LINE__);
  if (device == "CPU") {
    library->impl("_scaled_dot_product_flash_attention_for_cpu", &cpu_forward);
    library->impl("_scaled_dot_product_flash_attention_for_cpu_backward", &cpu_backward);
    return library;
  }
  library->impl("_scaled_dot_product_flash_attention", &flash_forward);
  library->impl("_scaled_dot_product_flash_attention_backward", &flash_backward);
  library->impl("_scaled_dot_product_efficient_attention", &efficient_forward);
  library->impl("_scaled_dot_product_efficient_attention_backward", &efficient_backward);
  library->impl("_scaled_dot_product_cudnn_attention", &cudnn_forward);
  library->impl("_scaled_dot_product_cudnn_attention_backward", &cudnn_backward);
  return library;
}

/// What a library registered goes with it.
std::map<std::string, std::unique_ptr<StableLibrary>>& libraries() {
  static std::map<std::string, std::unique_ptr<StableLibrary>> by_device;
  return by_device;
}

}  // namespace
}  // namespace flash_attn

void flash_attn_override(const char* device) {
  auto& library = flash_attn::libraries()[device];
  if (library == nullptr) library = flash_attn::kernels_for(device);
}

void flash_attn_restore(const char* device) { flash_attn::libraries().erase(device); }
