#include "check.h"

#include <stdexcept>
#include <string>

namespace flash_attn::cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorInsufficientDriver) {
    int runtime = 0, driver = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    throw std::runtime_error("flash_attn was built with CUDA " + version(runtime) +
                             ", but the driver supports only CUDA " + version(driver) + ": update the driver");
  }
  throw std::runtime_error(std::string("flash_attn: ") + what + " failed: " + cudaGetErrorString(error));
}

}  // namespace flash_attn::cuda
