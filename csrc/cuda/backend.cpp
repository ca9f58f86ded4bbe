// CUDA as the ops see it: the list of kernel families, facts of the device, its current stream.
#include "../backend.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "copy_rows.h"
#include "gather_keys.h"
#include "mask/band.h"
#include "mask/packed_mask.h"
#include "mask/rounded_gradient.h"
#include "universal/universal.h"
#ifdef FLASH_ATTN_WITH_DECODE
#include "decode/decode.h"
#endif
#ifdef FLASH_ATTN_WITH_SM80
#include "sm80/sm80.h"
#endif
#ifdef FLASH_ATTN_WITH_SM90
#include "sm90/sm90.h"
#endif

// Lives in libtorch_cuda. Weak: under a torch without CUDA it stays null and the library still loads.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace flash_attn {

namespace {

constexpr int kMaxDevices = 64;

DeviceInfo read_device_info(int device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    cuda::check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
  };
  DeviceInfo info;
  info.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  info.num_sms = attribute(cudaDevAttrMultiProcessorCount);
  info.shared_memory_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  info.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  return info;
}

DeviceInfo device_info(int device) {
  static std::array<DeviceInfo, kMaxDevices> known;
  static std::array<std::once_flag, kMaxDevices> once;
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("flash_attn: device index out of range");
  std::call_once(once[device], [device] { known[device] = read_device_info(device); });
  return known[device];
}

void* enter(int device, int* previous) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("flash_attn got a CUDA tensor, but the installed torch is built without CUDA");
  }
  cuda::check(cudaGetDevice(previous), "cudaGetDevice");
  // Also where it is the current one already: a thread that never used CUDA, as autograd's may be, has no context yet,
  // and the driver's tensor maps need one.
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("flash_attn: torch has no current stream for cuda:" + std::to_string(device));
  }
  return stream;
}

void leave(int device, int previous) {
  if (previous != device) cudaSetDevice(previous);
}

/// Allocated once a device and never freed: graphs that were captured keep on writing there.
void* unread(int device, int64_t bytes) {
  constexpr int64_t kBytes = 256 << 10;  // what needs more computes for longer than the host takes for an allocation
  static std::array<std::atomic<void*>, kMaxDevices> rooms{};
  if (bytes > kBytes || device < 0 || device >= kMaxDevices) return nullptr;
  if (void* known = rooms[device].load(std::memory_order_acquire)) return known;
  int previous = 0;
  enter(device, &previous);
  // A stream that is being captured, be it another thread's, would not bear an allocation.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cuda::check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  void* room = nullptr;
  void* another_threads = nullptr;
  const cudaError_t error = cudaMalloc(&room, kBytes);
  if (error == cudaSuccess && !rooms[device].compare_exchange_strong(another_threads, room)) cudaFree(room);
  cudaThreadExchangeStreamCaptureMode(&mode);
  leave(device, previous);
  if (error != cudaSuccess) {
    cudaGetLastError();  // an allocation by torch may yet succeed, and says what is wrong if not
    return nullptr;
  }
  return rooms[device].load(std::memory_order_acquire);
}

}  // namespace

const Backend& cuda_backend() {
  static const Backend backend = {
      {
#ifdef FLASH_ATTN_WITH_DECODE
          &cuda::decode::kForward,
#endif
#ifdef FLASH_ATTN_WITH_SM90
          &cuda::sm90::kForward,
#endif
#ifdef FLASH_ATTN_WITH_SM80
          &cuda::sm80::kForward,
#endif
          &cuda::universal::kForward,
      },
      {
#ifdef FLASH_ATTN_WITH_SM90
          &cuda::sm90::kBackward,
#endif
#ifdef FLASH_ATTN_WITH_SM80
          &cuda::sm80::kBackward,
#endif
          &cuda::universal::kBackward,
      },
      {
#ifdef FLASH_ATTN_WITH_DECODE
          &cuda::decode::kFloat8Forward,
#endif
      },
      cuda::copy_rows,
      cuda::gather_keys,
      [](const MaskView& mask, void* data, void* stream) {
        cuda::mask::prepare(mask, data, static_cast<cudaStream_t>(stream));
      },
      [](const float* from, void* to, DType dtype, int64_t count, void* stream) {
        cuda::mask::round_gradient(from, to, dtype, count, static_cast<cudaStream_t>(stream));
      },
      device_info,
      enter,
      leave,
      unread,
  };
  return backend;
}

}  // namespace flash_attn
