// CUDA as the ops see it: the list of kernel families, facts of the device, its current stream.
#include "../backend.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "common/copy_rows.h"
#include "mask/packed_mask.h"
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

}  // namespace

const Backend& cuda_backend() {
  static const Backend backend = {
      {
#ifdef FLASH_ATTN_WITH_DECODE
          &cuda::decode::kForward,
#endif
#ifdef FLASH_ATTN_WITH_SM90
          &cuda::sm90::forward::kKernel,
#endif
#ifdef FLASH_ATTN_WITH_SM80
          &cuda::sm80::kForward,
#endif
          &cuda::universal::kForward,
      },
      {
#ifdef FLASH_ATTN_WITH_SM90
          &cuda::sm90::backward::kKernel,
#endif
#ifdef FLASH_ATTN_WITH_SM80
          &cuda::sm80::kBackward,
#endif
          &cuda::universal::kBackward,
      },
      cuda::copy_rows,
      [](const MaskView& mask, void* data, void* stream) {
        cuda::mask::pack(mask, data, static_cast<cudaStream_t>(stream));
      },
      device_info,
      enter,
      leave,
  };
  return backend;
}

}  // namespace flash_attn
