// The arguments of an op that lists them as `Arguments` does, as the dispatcher hands them over.
#pragma once

#include <array>
#include <cstring>
#include <type_traits>

#include "../torch/stack.h"

namespace flash_attn {

template <typename List>
class Given {
  static constexpr int count() {
    int count = 0;
    List().for_each_tensor([&](const char*, const auto&) { ++count; });
    return count;
  }

 public:
  /// Takes all of them.
  explicit Given(StableIValue* values) {
    Stack stack(values);
    OptionalTensor* tensor = tensors_.data();
    arguments_.for_each_tensor([&](const char*, const auto& info) {
      if constexpr (std::is_same_v<decltype(info), const TensorInfo&>) {
        *tensor++ = stack.take<Tensor>();
      } else {
        *tensor++ = stack.take<OptionalTensor>();
      }
    });
    arguments_.for_each_option(
        [&](const char*, const char*, auto& value) { value = stack.take<std::remove_reference_t<decltype(value)>>(); });
  }

  void describe() {
    OptionalTensor* tensor = tensors_.data();
    arguments_.for_each_tensor([&](const char* name, auto& info) {
      if (*tensor) info = info_of(**tensor, name);
      ++tensor;
    });
  }

  /// A tensor that is only read becomes one whose rows kernels can read.
  void make_unit_stride(const char* which) {
    OptionalTensor* tensor = tensors_.data();
    arguments_.for_each_tensor([&](const char* name, auto& info) {
      if (*tensor && std::strcmp(name, which) == 0) {
        TensorInfo copy = info_of(**tensor, name);
        flash_attn::make_unit_stride(**tensor, copy, name);
        info = copy;
      }
      ++tensor;
    });
  }

  const List& arguments() const { return arguments_; }
  const Tensor& first() const { return *tensors_[0]; }

 private:
  std::array<OptionalTensor, size_t(count())> tensors_;
  List arguments_;
};

}  // namespace flash_attn
