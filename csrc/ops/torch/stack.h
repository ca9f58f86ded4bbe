// The arguments of a call as the dispatcher hands them to a boxed kernel.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <type_traits>
#include <utility>

#include "../arguments/arguments.h"
#include "torch_tensor.h"

namespace flash_attn {

/// Takes arguments in the order of the schema. All must be taken before anything may throw: nobody frees what stays.
class Stack {
 public:
  explicit Stack(StableIValue* values) : next_(values) {}

  template <typename T>
  T take() {
    using torch::stable::detail::to;
    if constexpr (std::is_same_v<T, Tensor>) {
      return Tensor(to<AtenTensorHandle>(*next_++));
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      const auto handle = to<std::optional<AtenTensorHandle>>(*next_++);
      return handle ? OptionalTensor(*handle) : std::nullopt;
    } else {
      return to<T>(*next_++);
    }
  }

 private:
  StableIValue* next_;
};

inline StableIValue result_of(int64_t number) { return torch::stable::detail::from(number); }
inline StableIValue result_of(Tensor&& tensor) {
  AtenTensorHandle handle = std::move(tensor).release();
  if (handle == nullptr) Tensor::check(aoti_torch_new_uninitialized_tensor(&handle));
  return torch::stable::detail::from(handle);
}
inline StableIValue result_of(OptionalTensor&& tensor) {
  std::optional<AtenTensorHandle> handle;
  if (tensor) handle = std::move(*tensor).release();
  return torch::stable::detail::from(handle);
}

/// Puts results where the arguments were, once those are taken.
template <typename... Results>
void put_results(StableIValue* values, Results&&... results) {
  ((*values++ = result_of(std::forward<Results>(results))), ...);
}

constexpr int count_tensors() {
  int count = 0;
  Arguments().for_each_tensor([&](const char*, const auto&) { ++count; });
  return count;
}

/// Arguments with the tensors that they describe.
class Inputs {
 public:
  void take_tensors(Stack& stack);
  void take_options(Stack& stack);
  /// In place of these two, where q, k and v are all. Between them and the options may stand what only backward takes.
  void take_plain_tensors(Stack& stack);
  PlainOptions take_plain_options(Stack& stack);
  PlainOptions set_plain_options(std::optional<double> softmax_scale, int64_t options);
  /// For other ops' arguments that mean the same as ours. The mask may have fewer than four dimensions, or be
  /// undefined.
  void set_mask(OptionalTensor mask);
  Arguments& options() { return arguments_; }
  /// To be called once everything is taken.
  void describe();
  /// May also be called after.
  void set_rng_state(Tensor rng_state);
  /// Results are to lie in memory as (batch, seqlen, heads, head_dim), whatever order q, k and v have.
  void lay_results_out_by_rows();

  const Arguments& arguments() const { return arguments_; }
  /// As the caller passed them, before any copy: their memory order is the results'.
  const TensorInfo& q_given() const { return q_given_; }
  const TensorInfo& k_given() const { return k_given_; }
  const TensorInfo& v_given() const { return v_given_; }
  const OptionalTensor& rng_state() const { return tensors_.back(); }

 private:
  std::array<OptionalTensor, count_tensors()> tensors_;
  bool mask_broadcasts_ = false;
  Arguments arguments_;
  TensorInfo q_given_, k_given_, v_given_;
};

}  // namespace flash_attn
