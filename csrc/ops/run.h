// From parameters to a kernel: select, plan, allocate, launch.
#pragma once

#include <utility>

#include "../select_kernel.h"
#include "attention.h"
#include "torch/torch_tensor.h"

namespace flash_attn {

/// Makes the tensors' device current while it lives.
class DeviceScope {
 public:
  DeviceScope(const Backend& backend, int device)
      : backend_(backend), device_(device), stream_(backend.enter(device, &previous_)) {}
  ~DeviceScope() { backend_.leave(device_, previous_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  void* stream() const { return stream_; }

 private:
  const Backend& backend_;
  int device_, previous_ = 0;
  void* stream_;
};

inline ForwardParams& problem(ForwardParams& params) { return params; }
inline ForwardParams& problem(BackwardParams& params) { return params.forward; }

/// Scratch memory beside what a kernel asks for, and what is to be done with it, on the kernel's stream, before it
/// goes.
struct NoScratch {
  static constexpr int64_t bytes = 0;
  void place(void*) const {}
  void after(void*) const {}
};

template <typename Params, typename Scratch = NoScratch>
void run(const std::vector<const Kernel<Params>*>& kernels, const Backend& backend, Params& params,
         const TensorInfo& like, const Scratch& scratch = {}) {
  ForwardParams& p = problem(params);
  const DeviceInfo info = backend.device_info(p.device_index);
  const Kernel<Params>& kernel = select_kernel(kernels, params, info);
  const Plan plan = kernel.plan(params, info);
  const int64_t scratch_begin = (plan.workspace_bytes + 255) / 256 * 256;
  const int64_t bytes = scratch.bytes > 0 ? scratch_begin + scratch.bytes : plan.workspace_bytes;
  Tensor workspace;
  if (bytes > 0) {
    NewTensor room = empty_contiguous(1, &bytes, DType::kOther, like, "the kernel's workspace");
    workspace = std::move(room.tensor);
    p.workspace = room.info.data;
    scratch.place(static_cast<char*>(room.info.data) + scratch_begin);
  }
  const DeviceScope scope(backend, p.device_index);
  kernel.launch(params, info, scope.stream());
  scratch.after(scope.stream());
}

/// On the device of `like`.
inline void copy_rows(const RowCopies& copies, const TensorInfo& like) {
  const Backend& backend = backend_of(like.device);
  const DeviceScope scope(backend, like.device_index);
  backend.copy_rows(copies, scope.stream());
}

/// What forward returns, not yet filled; `params` gets to know it. With lse_is_read false there may be no lse, and
/// with `given_lse`, which is written to then, there is none.
inline Results empty_results(ForwardParams& params, const TensorInfo& q_given, bool heads_first,
                             bool lse_is_read = true, const Tensor* given_lse = nullptr) {
  const DType dtype = statistics_dtype(params.dtype);
  const int64_t dense[] = {params.batch, params.num_heads, params.seqlen_q},
                packed[] = {params.num_heads, params.total_q};
  Results results;
  NewTensor out = empty_like_dense(q_given, params.head_dim_v, "out");
  results.out = std::move(out.tensor);
  params.out = tensor_view(out.info, heads_first);
  if (given_lse != nullptr) {
    params.lse = row_view(info_of(*given_lse, "lse"));
    return results;
  }
  if (!lse_is_read && !params.is_varlen_q()) {
    const int64_t heads = params.num_heads * params.seqlen_q;
    params.lse = {backend_of(params.device).unread(params.device_index, params.batch * heads * size_of(dtype)), heads,
                  params.seqlen_q, 1};
    if (params.lse.data != nullptr) return results;
  }
  NewTensor lse = params.is_varlen_q() ? empty_contiguous(2, packed, dtype, q_given, "lse")
                                       : empty_contiguous(3, dense, dtype, q_given, "lse");
  results.lse = std::move(lse.tensor);
  params.lse = row_view(lse.info);
  return results;
}

}  // namespace flash_attn
