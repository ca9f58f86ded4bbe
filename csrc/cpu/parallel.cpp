#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "../out_of_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace flash_attn::cpu {

constexpr uintptr_t kHugePage = 2 << 20;

Buffer::Buffer(int64_t bytes)
    : data_(::operator new(size_t(std::max<int64_t>(bytes, 1)), std::align_val_t(kCacheLine), std::nothrow)) {
  if (data_ == nullptr) throw_out_of_memory(DeviceType::kCPU, double(bytes), "scratch memory");
#if defined(__linux__)
  // Fresh memory comes page by page, each with a fault: huge pages make that 512 times rarer. Only advice, so its
  // result does not matter.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data_) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data_) + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() { ::operator delete(data_, std::align_val_t(kCacheLine)); }

void run_tasks(int64_t count, int64_t scratch_bytes, Task task, const void* context) {
  if (count <= 0) return;
  const int64_t workers = std::min<int64_t>(std::max<int64_t>(torch::stable::get_num_threads(), 1), count);
  // A cache line between the scratch of two threads, so that they never share one.
  const int64_t stride = (scratch_bytes + 2 * kCacheLine - 1) / kCacheLine * kCacheLine;
  const Buffer scratch(workers * stride);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      char* own = static_cast<char*>(scratch.data()) + worker * stride;
      for (int64_t index = next++; index < count; index = next++) task(context, index, own);
    }
  });
}

}  // namespace flash_attn::cpu
