#include "rng_state.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <limits>
#include <optional>
#include <stdexcept>

#include "torch/torch_tensor.h"

namespace flash_attn {

Tensor drawn_rng_state(const TensorInfo& like) {
  using torch::stable::detail::from;
  const int64_t size = 2;
  Tensor state = empty_contiguous(1, &size, DType::kInt64, like, "the state of dropout").tensor;
  std::array<StableIValue, 4> stack{from(state.shared()), from(std::numeric_limits<int64_t>::min()),
                                    from(std::optional<int64_t>(std::numeric_limits<int64_t>::max())),
                                    from(std::nullopt)};
  if (torch_call_dispatcher("aten::random_", "from", stack.data(), TORCH_ABI_VERSION) != 0) {
    throw std::runtime_error("flash_attn: torch draws no random numbers for dropout");
  }
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  return state;
}

}  // namespace flash_attn
