// Which kernels a float32 backward problem gets, and what they need.
#pragma once

#include "../../../../kernel.h"
#include "../kernels.h"

namespace flash_attn::cuda::sm80::fp32 {

struct BackwardPlan {
  static constexpr int kMaxKernels = 3;
  const BackwardVariant* kernels[kMaxKernels] = {};  // that compute all gradients together; behind them null
  const char* products = "";                         // see Kernels
  bool adds_mask_gradient = false;

  Planes q, k, v, dout;  // without addresses
  // Of the workspace, in bytes from its start, where universal::RowWorkspace is.
  int64_t flags = 0;
  int64_t q_data = 0, k_data = 0, v_data = 0, dout_data = 0, q_units = 0, k_units = 0, v_units = 0, dout_units = 0;
  bool packs_mask = false;                     // as in the forward pass
  int64_t packed_mask = 0, unpacked_mask = 0;  // the other one is for flagged heads and dmask
  int64_t workspace_bytes = 0;

  bool adds_dq() const { return kernels[0]->adds_dq(); }
};

/// Without kernels where none fit.
BackwardPlan plan_backward(const BackwardParams& params, const DeviceInfo& device, const Kernels& kernels);

Plan describe(const BackwardPlan& plan);

void launch_backward(const BackwardParams& params, const BackwardPlan& plan, const DeviceInfo& device, void* stream);

}  // namespace flash_attn::cuda::sm80::fp32
