// Kernels that a variable of the environment asks for by name, for tests and measurements.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace flash_attn::cuda::sm80 {

class ForcedKernel {
 public:
  /// `variable` may hold a kernel's name. `shared`: other families have kernels by it too, whose names, without "mma ",
  /// are not meant for this one.
  ForcedKernel(const char* variable, bool shared) : variable_(variable) {
    const char* const name = std::getenv(variable);
    if (name != nullptr && (!shared || std::string(name).rfind("mma ", 0) == 0)) name_ = name;
  }

  bool allows(const char* kernel) const { return name_.empty() || name_ == kernel; }

  /// Where no kernel that it allows takes the problem: throws if it asks for one. `visit_names(visit)` visits the names
  /// of those that do.
  template <typename VisitNames>
  void require(const VisitNames& visit_names) const {
    if (name_.empty()) return;
    std::string names;
    visit_names([&](const char* name) { names += std::string(names.empty() ? "" : ", ") + name; });
    throw std::runtime_error(std::string(variable_) + "=" + name_ +
                             " does not take this problem; the kernels that do are: " + names);
  }

 private:
  const char* variable_;
  std::string name_;
};

}  // namespace flash_attn::cuda::sm80
