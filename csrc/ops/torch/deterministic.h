#pragma once

namespace flash_attn {

/// What torch.are_deterministic_algorithms_enabled() says; true of a torch that can't be asked.
bool deterministic_algorithms_enabled();

}  // namespace flash_attn
