// FLASH_ATTN_BACKWARD_PLAN: decisions that are taken out of the planner's hands, for tests and measurements.
#pragma once

#include <cstdint>
#include <string>

namespace flash_attn::cuda::sm90::backward {

/// "row_parts=3,dq_writing=0": names are those that explain() shows. -1: the planner decides.
struct Forced {
  int head_parts = -1;   // SplitPlan::head_parts
  int row_parts = -1;    // SplitPlan::row_parts
  int one_cta = -1;      // DqPath::kOneCta
  int dq_writing = -1;   // DqWritingPlan::enabled
  int preparation = -1;  // rows are prepared by tiles

  std::string text;  // as it stands in the environment

  /// Throws std::runtime_error for names and numbers that there are not.
  static Forced from_environment();
  /// Throws std::runtime_error if a decision that is asked for did not come about.
  void require(const char* name, int wanted, int64_t chosen) const;
};

}  // namespace flash_attn::cuda::sm90::backward
