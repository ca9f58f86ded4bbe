#include "stack.h"

#include <type_traits>

namespace flash_attn {

void Inputs::take_tensors(Stack& stack) {
  OptionalTensor* tensor = tensors_.data();
  arguments_.for_each_tensor([&](const char*, const auto& info) {
    constexpr bool required = std::is_same_v<decltype(info), const TensorInfo&>;
    if constexpr (required) {
      *tensor++ = stack.take<Tensor>();
    } else {
      *tensor++ = stack.take<OptionalTensor>();
    }
  });
}

void Inputs::take_options(Stack& stack) {
  arguments_.for_each_option(
      [&](const char*, const char*, auto& value) { value = stack.take<std::remove_reference_t<decltype(value)>>(); });
}

void Inputs::describe() {
  const OptionalTensor* tensor = tensors_.data();
  arguments_.for_each_tensor([&](const char* name, auto& info) {
    if (*tensor) info = info_of(**tensor, name);
    ++tensor;
  });
  q_given_ = arguments_.q, k_given_ = arguments_.k, v_given_ = arguments_.v;
  make_unit_stride(*tensors_[0], arguments_.q, "q");
  make_unit_stride(*tensors_[1], arguments_.k, "k");
  make_unit_stride(*tensors_[2], arguments_.v, "v");
}

}  // namespace flash_attn
