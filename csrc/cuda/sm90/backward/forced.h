// FLASH_ATTN_BACKWARD_PLAN: decisions that are taken out of the planner's hands, for tests and measurements.
#pragma once

#include <cstdint>

#include "../../common/forced_decisions.h"

namespace flash_attn::cuda::sm90::backward {

/// -1: the planner decides.
struct Forced {
  int head_parts = -1;   // SplitPlan::head_parts
  int row_parts = -1;    // SplitPlan::row_parts
  int one_cta = -1;      // DqPath::kOneCta
  int dq_writing = -1;   // DqWritingPlan::enabled
  int preparation = -1;  // rows are prepared by tiles

  ForcedDecisions decisions{"FLASH_ATTN_BACKWARD_PLAN",
                            {{"head_parts", &head_parts, 1, 1 << 20},
                             {"row_parts", &row_parts, 1, 1 << 20},
                             {"one_cta", &one_cta, 0, 1},
                             {"dq_writing", &dq_writing, 0, 1},
                             {"preparation", &preparation, 0, 1}}};

  bool any() const { return head_parts >= 0 || row_parts >= 0 || one_cta >= 0 || dq_writing >= 0 || preparation >= 0; }
};

}  // namespace flash_attn::cuda::sm90::backward
