// Threads and memory of the CPU family. Everything here is compiled once, outside the instruction-set folders of code,
// so that those contain no library template the linker could merge across instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flash_attn::cpu {

constexpr int64_t kCacheLine = 64;

/// Uninitialised memory, aligned to a cache line. Throws when there is none.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

/// task(context, index, scratch) does one piece of work; `scratch` belongs to the running thread. It must not throw.
using Task = void (*)(const void* context, int64_t index, void* scratch);

/// How many threads the caller's tasks will have.
int64_t num_threads();

/// Runs the tasks [0, count). Threads draw the next index when they are done with one, so the first tasks should be the
/// heaviest. Each writes only what it owns, so the result does not depend on who runs it.
void run_tasks(int64_t count, int64_t scratch_bytes, Task task, const void* context);

/// Hands out pieces of one block of memory. Without a block it only counts, which gives the size to allocate.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + used_);
    used_ += (count * int64_t(sizeof(T)) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

}  // namespace flash_attn::cpu
