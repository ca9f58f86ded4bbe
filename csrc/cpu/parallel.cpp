#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>

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

namespace {

/// A thread's scratch, kept for its next call up to a size that small calls need: to break it out of the heap and to
/// put it back takes those a tenth of their time.
class KeptScratch {
 public:
  explicit KeptScratch(int64_t bytes) : bytes_(bytes) {
    if (bytes <= kBytes && kept_) {
      own_ = std::move(kept_);
    } else {
      own_ = std::make_unique<Buffer>(bytes <= kBytes ? kBytes : bytes);
    }
  }
  ~KeptScratch() {
    if (bytes_ <= kBytes) kept_ = std::move(own_);
  }
  KeptScratch(const KeptScratch&) = delete;
  KeptScratch& operator=(const KeptScratch&) = delete;
  char* data() const { return static_cast<char*>(own_->data()); }

 private:
  static constexpr int64_t kBytes = 256 << 10;
  static thread_local std::unique_ptr<Buffer> kept_;
  int64_t bytes_;
  std::unique_ptr<Buffer> own_;
};

thread_local std::unique_ptr<Buffer> KeptScratch::kept_;

}  // namespace

int64_t num_threads() { return std::max<int64_t>(torch::stable::get_num_threads(), 1); }

void run_tasks(int64_t count, int64_t scratch_bytes, Task task, const void* context) {
  if (count <= 0) return;
  const int64_t workers = std::min<int64_t>(num_threads(), count);
  // A cache line between the scratch of two threads, so that they never share one.
  const int64_t stride = (scratch_bytes + 2 * kCacheLine - 1) / kCacheLine * kCacheLine;
  const KeptScratch scratch(workers * stride);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      char* own = scratch.data() + worker * stride;
      for (int64_t index = next++; index < count; index = next++) task(context, index, own);
    }
  });
}

}  // namespace flash_attn::cpu
