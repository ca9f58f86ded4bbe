// A device type as the ops see it: its kernel families, facts of a device, its current stream.
#pragma once

#include <vector>

#include "float8.h"
#include "host_device.h"
#include "kernel.h"
#include "row_copies.h"

namespace flash_attn {

struct Backend {
  /// Fastest family first; the last one refuses nothing.
  std::vector<const ForwardKernel*> forward;
  std::vector<const BackwardKernel*> backward;
  /// Forward over float8 caches.
  std::vector<const Kernel<Float8Params>*> float8;
  void (*copy_rows)(const RowCopies&, void* stream);
  /// Null: no family would be faster on copies.
  void (*gather_keys)(const KeyGather&, void* stream);
  /// Packs attn_mask into stored_bytes() at `data`, see packed_mask.h and mask_kind.h.
  void (*pack_mask)(const MaskView& mask, void* data, void* stream);
  /// Rounds `count` numbers of float32 to a dtype of 16 bits. Null: torch's own copy does it.
  void (*round)(const float* from, void* to, DType dtype, int64_t count, void* stream);
  DeviceInfo (*device_info)(int device_index);
  /// Makes the device current for the calling thread and returns the stream to launch on; `leave` undoes it.
  void* (*enter)(int device_index, int* previous_device);
  void (*leave)(int device_index, int previous_device);
  /// Room for an lse that nobody will read: the same for all calls, which may write to it at once. Null for more bytes
  /// than it has; those are worth an allocation.
  void* (*unread)(int device_index, int64_t bytes);
};

FLASH_ATTN_EXPORT const Backend& cpu_backend();
#ifdef FLASH_ATTN_WITH_CUDA
FLASH_ATTN_EXPORT const Backend& cuda_backend();
#endif

}  // namespace flash_attn
