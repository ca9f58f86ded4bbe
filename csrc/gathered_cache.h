// Many query rows over a cache in pages or the like: what its sequences use is copied to rows that follow each other,
// and attended to by the kernels for long queries, which do not read caches.
#pragma once

#include <vector>

#include "backend.h"
#include "kernel.h"

namespace flash_attn {

/// The problem on copies of a cache's rows.
struct GatheredCache {
  KeyGather gather;      // how the copies come to be
  ForwardParams params;  // the same problem over them
  int64_t bytes = 0;     // of the copies and their lengths

  FLASH_ATTN_EXPORT explicit GatheredCache(const ForwardParams& over_cache);

  /// Says where the copies are: `bytes` at `memory`, which is aligned to 16.
  void place(void* memory);
};

/// Whether copies are made: the one rule. `kernels` are the families of the device.
FLASH_ATTN_EXPORT bool gathers_cache(const ForwardParams& over_cache, const std::vector<const ForwardKernel*>& kernels,
                                     const DeviceInfo& device);

}  // namespace flash_attn
