// For kernels that stand under the Autograd key of an op and call the op again, below autograd.
#pragma once

#include <string>

namespace flash_attn {

/// Whether this torch lets a kernel go on below autograd.
bool can_go_below_autograd();

/// While it lives, calls of the dispatcher pass over the kernels under a key, "AutogradCPU" or "AutogradCUDA".
class BelowAutograd {
 public:
  explicit BelowAutograd(const std::string& key);
  ~BelowAutograd();
  BelowAutograd(const BelowAutograd&) = delete;
  BelowAutograd& operator=(const BelowAutograd&) = delete;

 private:
  int key_;
  bool was_excluded_;
};

}  // namespace flash_attn
