// Decisions that a variable of the environment takes out of a planner's hands, for tests and measurements.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace flash_attn::cuda {

struct ForcedDecision {
  const char* name;  // as explain() shows it
  int* value;        // left alone where the variable does not say it
  int least, most;
};

class ForcedDecisions {
 public:
  /// `variable` holds "row_parts=3,dq_writing=0". Throws std::runtime_error for names and numbers that there are not.
  ForcedDecisions(const char* variable, std::initializer_list<ForcedDecision> decisions);
  /// Throws std::runtime_error if a decision that is asked for did not come about; below 0 none is.
  void require(const char* name, int wanted, int64_t chosen) const;

 private:
  std::string text_;  // the variable and its text
};

}  // namespace flash_attn::cuda
