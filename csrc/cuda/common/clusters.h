// Host code, for planners: clusters of CTAs, from Hopper on.
#pragma once

#include "../../kernel.h"
#include "../../sequence.h"

namespace flash_attn::cuda {

constexpr int kMostOfCluster = 8;  // CTAs that any GPU puts together

/// CTAs that run at once at least as clusters, which get an SM for each: neighbouring SMs have pairs, larger clusters
/// are spread over a GPC, which is of 14 to 18 SMs.
inline int ctas_in_clusters(const DeviceInfo& device, int cluster) {
  constexpr int kLeastSms = 14, kMostSms = 18;
  if (cluster <= 2) return device.num_sms / 2 * 2;
  return int(ceil_div(device.num_sms, kMostSms)) * (kLeastSms / cluster) * cluster;
}

}  // namespace flash_attn::cuda
