#include "stack.h"

#include <algorithm>
#include <type_traits>

#include "../arguments/refuse.h"

namespace flash_attn {

namespace {

TensorInfo& given(TensorInfo& info) { return info; }
TensorInfo& given(std::optional<TensorInfo>& info) { return *info; }

constexpr int kMask = 3;  // its place among the tensors

void add_leading_dimensions(TensorInfo& mask) {
  if (mask.ndim == 0) refuse("attn_mask must have at least 1 dimension");
  for (; mask.ndim < 4; ++mask.ndim) {
    std::copy_backward(mask.size, mask.size + mask.ndim, mask.size + mask.ndim + 1);
    std::copy_backward(mask.stride, mask.stride + mask.ndim, mask.stride + mask.ndim + 1);
    mask.size[0] = 1;
    mask.stride[0] = 0;
  }
}

/// (batch, heads, seqlen, head_dim), as if it were a view of (batch, seqlen, heads, head_dim).
void lie_by_rows(TensorInfo& info) {
  info.stride[3] = 1;
  info.stride[1] = std::max<int64_t>(info.size[3], 1);
  info.stride[2] = info.stride[1] * std::max<int64_t>(info.size[1], 1);
  info.stride[0] = info.stride[2] * std::max<int64_t>(info.size[2], 1);
}

}  // namespace

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

void Inputs::take_plain_tensors(Stack& stack) {
  for (int i = 0; i < 3; ++i) tensors_[i] = stack.take<Tensor>();
}

PlainOptions Inputs::take_plain_options(Stack& stack) {
  const auto softmax_scale = stack.take<std::optional<double>>();
  return set_plain_options(softmax_scale, stack.take<int64_t>());
}

PlainOptions Inputs::set_plain_options(std::optional<double> softmax_scale, int64_t number) {
  const PlainOptions options(number);
  arguments_.softmax_scale = softmax_scale;
  arguments_.causal = options.causal;
  arguments_.heads_first = options.heads_first;
  arguments_.deterministic = options.deterministic;
  return options;
}

void Inputs::set_mask(OptionalTensor mask) {
  if (!mask || !mask->is_defined()) return;
  tensors_[kMask] = std::move(mask);
  mask_broadcasts_ = true;
}

void Inputs::set_rng_state(Tensor rng_state) {
  arguments_.rng_state = info_of(rng_state, "rng_state");
  tensors_.back() = std::move(rng_state);
}

void Inputs::lay_results_out_by_rows() {
  for (TensorInfo* given : {&q_given_, &k_given_, &v_given_}) lie_by_rows(*given);
}

void Inputs::describe() {
  OptionalTensor* tensor = tensors_.data();
  arguments_.for_each_tensor([&](const char* name, auto& info) {
    if (*tensor) info = info_of(**tensor, name);
    ++tensor;
  });
  if (mask_broadcasts_) add_leading_dimensions(*arguments_.attn_mask);
  q_given_ = arguments_.q, k_given_ = arguments_.k, v_given_ = arguments_.v;
  const void* const mask = &arguments_.attn_mask;  // is large, and read by its strides
  tensor = tensors_.data();
  arguments_.for_each_tensor([&](const char* name, auto& info) {
    if (*tensor && &info != mask) make_unit_stride(**tensor, given(info), name);
    ++tensor;
  });
}

}  // namespace flash_attn
