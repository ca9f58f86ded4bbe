#include "select_kernel.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace flash_attn {

namespace {

const ForwardParams& problem(const ForwardParams& params) { return params; }
const ForwardParams& problem(const BackwardParams& params) { return params.forward; }

template <typename Params>
std::string families(const std::vector<const Kernel<Params>*>& kernels) {
  std::string names;
  for (const auto* kernel : kernels) names += (names.empty() ? "" : ", ") + std::string(kernel->family);
  return names;
}

/// Why none of the families, or not the forced one, takes the problem.
template <typename Params>
std::string all_reasons(const std::vector<const Kernel<Params>*>& kernels, const Params& params, const DeviceInfo& info,
                        const char* forced) {
  std::string reasons;
  for (const auto* kernel : kernels) {
    if (forced != nullptr && std::strcmp(forced, kernel->family) != 0) continue;
    reasons += std::string(reasons.empty() ? "" : "; ") + kernel->family + ": " + kernel->refuses(params, info);
  }
  return reasons;
}

}  // namespace

const Backend& backend_of(DeviceType device) {
  if (device == DeviceType::kCPU) return cpu_backend();
#ifdef FLASH_ATTN_WITH_CUDA
  return cuda_backend();
#else
  throw std::runtime_error(
      "flash_attn got CUDA tensors, but was built without CUDA kernels: rebuild with nvcc and FLASH_ATTN_CUDA=1");
#endif
}

const char* forced_family() {
  const char* const family = std::getenv("FLASH_ATTN_FORCE");
  return family != nullptr && *family != '\0' ? family : nullptr;
}

bool is_forced(const char* family) {
  const char* const forced = forced_family();
  return forced != nullptr && std::strcmp(forced, family) == 0;
}

bool allows_reduced_float32() {
  const char* const precision = std::getenv("FLASH_ATTN_FLOAT32");
  if (precision == nullptr || std::strcmp(precision, "") == 0 || std::strcmp(precision, "exact") == 0) return false;
  if (std::strcmp(precision, "reduced") == 0) return true;
  throw std::runtime_error(std::string("FLASH_ATTN_FLOAT32=") + precision + ": accepted are exact and reduced");
}

namespace {

template <typename Params>
const Kernel<Params>* first_of(const std::vector<const Kernel<Params>*>& kernels, const Params& params,
                               const DeviceInfo& info, const char* forced, std::vector<Rejection>* rejections) {
  for (const auto* kernel : kernels) {
    if (forced != nullptr && std::strcmp(forced, kernel->family) != 0) continue;
    const char* reason = kernel->refuses(params, info);
    if (reason == nullptr) return kernel;
    if (rejections != nullptr) rejections->push_back({kernel->family, reason});
  }
  return nullptr;
}

template <typename Params>
const char* forced_for(const Params& params) {
  return problem(params).device == DeviceType::kCUDA ? forced_family() : nullptr;
}

}  // namespace

const ForwardKernel* find_kernel(const std::vector<const ForwardKernel*>& kernels, const ForwardParams& params,
                                 const DeviceInfo& info) {
  return first_of(kernels, params, info, forced_for(params), nullptr);
}

template <typename Params>
const Kernel<Params>& select_kernel(const std::vector<const Kernel<Params>*>& kernels, const Params& params,
                                    const DeviceInfo& info, std::vector<Rejection>* rejections) {
  const char* const forced = forced_for(params);
  if (const Kernel<Params>* found = first_of(kernels, params, info, forced, rejections)) return *found;
  std::string reasons = all_reasons(kernels, params, info, forced);  // which a call that finds a kernel has no use for
  if (forced != nullptr) {
    if (reasons.empty()) reasons = "there is no such family, accepted are " + families(kernels);
    throw std::runtime_error(std::string("FLASH_ATTN_FORCE=") + forced + " does not take this problem: " + reasons);
  }
  throw std::runtime_error("no kernel takes this problem: " + reasons);
}

template FLASH_ATTN_EXPORT const ForwardKernel& select_kernel(const std::vector<const ForwardKernel*>&,
                                                              const ForwardParams&, const DeviceInfo&,
                                                              std::vector<Rejection>*);
template FLASH_ATTN_EXPORT const Kernel<Float8Params>& select_kernel(const std::vector<const Kernel<Float8Params>*>&,
                                                                     const Float8Params&, const DeviceInfo&,
                                                                     std::vector<Rejection>*);
template FLASH_ATTN_EXPORT const BackwardKernel& select_kernel(const std::vector<const BackwardKernel*>&,
                                                               const BackwardParams&, const DeviceInfo&,
                                                               std::vector<Rejection>*);

}  // namespace flash_attn
