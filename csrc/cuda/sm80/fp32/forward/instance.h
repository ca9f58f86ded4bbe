// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm80::fp32 {

template <int kHeadDim, int kWarps, int kMTiles, int kBlockN, int kSumSteps, int kBlocksPerSm, bool kExtended,
          bool kWgmma = false>
ForwardVariant forward_variant(const char* name) {
  using Config = ForwardConfig<kHeadDim, kWarps, kMTiles, kBlockN, kSumSteps, kBlocksPerSm, kExtended, kWgmma>;
  return {name,
          kHeadDim,
          Config::kBlockM,
          kBlockN,
          Config::kThreads,
          kBlocksPerSm,
          kExtended,
          Config::kQueryBytes + (kWgmma ? Config::kAlignment : 0),
          Config::kSlotBytes,
          forward_kernel<Config>};
}

}  // namespace flash_attn::cuda::sm80::fp32
