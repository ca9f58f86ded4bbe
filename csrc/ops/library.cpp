// Schemas of the ops, and the devices that they run on. Autograd, fake kernels and everything else that needs no C++ is
// registered in flash_attn/torch_op.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <type_traits>

#include "arguments/arguments.h"
#include "arguments/cache_arguments.h"
#include "arguments/rotary_arguments.h"
#include "attention.h"
#include "cache.h"

namespace flash_attn {
namespace {

/// The first `written` tensors are written to.
template <typename List>
std::string tensors_schema(int written = 0) {
  std::string schema;
  char alias = 'a';
  List().for_each_tensor([&](const char* name, const auto& tensor) {
    constexpr bool required = std::is_same_v<decltype(tensor), const TensorInfo&>;
    const bool is_written = alias < 'a' + written;
    const std::string type = is_written ? std::string("Tensor(") + alias + "!)" : required ? "Tensor" : "Tensor?";
    schema += type + " " + name + ", ";
    ++alias;
  });
  return schema;
}

template <typename List>
std::string options_schema() {
  std::string schema;
  List().for_each_option([&](const char* name, const char* type, const auto&) {
    schema += std::string(schema.empty() ? "" : ", ") + type + " " + name;
  });
  return schema;
}

}  // namespace
}  // namespace flash_attn

STABLE_TORCH_LIBRARY(flash_attn, m) {
  using namespace flash_attn;
  const std::string tensors = tensors_schema<Arguments>(), options = options_schema<Arguments>();
  // With dropout rng_state comes out again, so that who keeps the results of forward has all that backward needs;
  // without, rng_used is undefined, which Python sees as None. (torch.jit.trace takes no `Tensor?` for a result.)
  m.def(("forward(" + tensors + options + ") -> (Tensor out, Tensor lse, Tensor rng_used)").c_str());
  m.def(("backward(Tensor dout, Tensor? dlse, " + tensors + "Tensor out, Tensor lse, bool[] needs, " + options +
         ") -> (Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask, Tensor? dslopes, Tensor? dsinks)")
            .c_str());
  // Their tangents, in Python: flash_attn/torch_op/second_order.
  const std::string tangents =
      "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tattn_mask, Tensor? talibi_slopes, Tensor? tsinks, ";
  m.def(("forward_jvp(" + tangents + tensors + "Tensor out, Tensor lse, " + options + ") -> (Tensor tout, Tensor tlse)")
            .c_str());
  m.def(("backward_jvp(Tensor dout, Tensor? dlse, Tensor? tdout, Tensor? tdlse, " + tangents + tensors +
         "Tensor out, Tensor lse, Tensor? tout, Tensor? tlse, bool[] needs, " + options +
         ") -> (Tensor? tdq, Tensor? tdk, Tensor? tdv, Tensor? tdmask, Tensor? tdslopes, Tensor? tdsinks)")
            .c_str());
  // In place of the derivative of torch's op for extensions, which has none of its own:
  // flash_attn/torch_op/extension.py.
  m.def(
      "backward_of_extension(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor attn_bias, bool[4] "
      "grad_input_mask, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
      "float dropout_p, bool is_causal, Tensor philox_seed, Tensor philox_offset, *, float? scale=None) -> (Tensor "
      "grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_bias)");
  // For eager calls that nobody watches: each argument costs time, whether it is given or not.
  m.def("plain_forward(Tensor q, Tensor k, Tensor v, float? softmax_scale, int options) -> (Tensor out, Tensor lse)");
  m.def(
      "masked_forward(Tensor q, Tensor k, Tensor v, Tensor attn_mask, float? softmax_scale, int options) -> (Tensor "
      "out, "
      "Tensor lse)");
  m.def(
      "plain_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? softmax_scale, "
      "int options) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(("attend_cache(" + tensors_schema<CacheArguments>() + options_schema<CacheArguments>() +
         ") -> (Tensor out, Tensor lse)")
            .c_str());
  m.def(("append_and_attend(" + tensors_schema<AppendArguments>(2) + options_schema<AppendArguments>() +
         ") -> (Tensor out, Tensor lse)")
            .c_str());
  const std::string rotary_options = options_schema<RotaryArguments>();
  m.def(("rotary(" + tensors_schema<RotaryArguments>() + rotary_options + ") -> Tensor").c_str());
  m.def(("rotary_(" + tensors_schema<RotaryArguments>(1) + rotary_options + ") -> ()").c_str());
  // A mask read once: what forward and backward take as packed_mask.
  m.def("pack_mask(Tensor mask) -> Tensor");
  // A copy of `packed`, once `mask` was found to be of that version when the op runs.
  m.def("unchanged_mask(Tensor packed, Tensor mask, SymInt version) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CPU, m) {
  m.impl("forward", flash_attn::forward);
  m.impl("backward", flash_attn::backward);
  m.impl("plain_forward", flash_attn::plain_forward);
  m.impl("masked_forward", flash_attn::masked_forward);
  m.impl("plain_backward", flash_attn::plain_backward);
  m.impl("attend_cache", flash_attn::attend_cache);
  m.impl("append_and_attend", flash_attn::append_and_attend);
  m.impl("rotary", flash_attn::rotary);
  m.impl("rotary_", flash_attn::rotary_in_place);
  m.impl("pack_mask", flash_attn::pack_mask);
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
  m.impl("forward", flash_attn::forward);
  m.impl("backward", flash_attn::backward);
  m.impl("plain_forward", flash_attn::plain_forward);
  m.impl("masked_forward", flash_attn::masked_forward);
  m.impl("plain_backward", flash_attn::plain_backward);
  m.impl("attend_cache", flash_attn::attend_cache);
  m.impl("append_and_attend", flash_attn::append_and_attend);
  m.impl("rotary", flash_attn::rotary);
  m.impl("rotary_", flash_attn::rotary_in_place);
  m.impl("pack_mask", flash_attn::pack_mask);
}
