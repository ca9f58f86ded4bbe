// Schemas of the ops, and the devices that they run on. Autograd, fake kernels and everything else that needs no C++ is
// registered in flash_attn/torch_op.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <type_traits>

#include "arguments.h"
#include "attention.h"

namespace flash_attn {
namespace {

std::string tensors_schema() {
  std::string schema;
  Arguments().for_each_tensor([&](const char* name, const auto& tensor) {
    constexpr bool required = std::is_same_v<decltype(tensor), const TensorInfo&>;
    schema += std::string(required ? "Tensor " : "Tensor? ") + name + ", ";
  });
  return schema;
}

std::string options_schema() {
  std::string schema;
  Arguments().for_each_option([&](const char* name, const char* type, const auto&) {
    schema += std::string(schema.empty() ? "" : ", ") + type + " " + name;
  });
  return schema;
}

}  // namespace
}  // namespace flash_attn

STABLE_TORCH_LIBRARY(flash_attn, m) {
  const std::string tensors = flash_attn::tensors_schema(), options = flash_attn::options_schema();
  // With dropout rng_state comes out again, so that who keeps the results of forward has all that backward needs;
  // without, rng_used is undefined, which Python sees as None. (torch.jit.trace takes no `Tensor?` for a result.)
  m.def(("forward(" + tensors + options + ") -> (Tensor out, Tensor lse, Tensor rng_used)").c_str());
  m.def(("backward(Tensor dout, Tensor? dlse, " + tensors + "Tensor out, Tensor lse, bool[] needs, " + options +
         ") -> (Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask, Tensor? dslopes, Tensor? dsinks)")
            .c_str());
  // For eager calls that nobody watches: each argument costs time, whether it is given or not.
  m.def("plain_forward(Tensor q, Tensor k, Tensor v, float? softmax_scale, int options) -> (Tensor out, Tensor lse)");
  m.def(
      "plain_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? softmax_scale, "
      "int options) -> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CPU, m) {
  m.impl("forward", flash_attn::forward);
  m.impl("backward", flash_attn::backward);
  m.impl("plain_forward", flash_attn::plain_forward);
  m.impl("plain_backward", flash_attn::plain_backward);
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
  m.impl("forward", flash_attn::forward);
  m.impl("backward", flash_attn::backward);
  m.impl("plain_forward", flash_attn::plain_forward);
  m.impl("plain_backward", flash_attn::plain_backward);
}
