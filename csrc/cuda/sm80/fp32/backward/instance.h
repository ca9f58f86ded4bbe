// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm80::fp32 {

template <int kHeadDim, int kWarps, int kMTiles, int kBlockN, int kSumSteps, int kStages, int kBlocksPerSm,
          bool kOfKeys, bool kExtended, bool kWgmma = false>
BackwardVariant backward_variant(const char* name) {
  using Config =
      BackwardConfig<kHeadDim, kWarps, kMTiles, kBlockN, kSumSteps, kStages, kBlocksPerSm, kOfKeys, kExtended, kWgmma>;
  return {name,
          kHeadDim,
          Config::kBlockM,
          kBlockN,
          Config::kThreads,
          kOfKeys,
          kExtended,
          Config::kSharedBytes,
          backward_kernel<Config>};
}

}  // namespace flash_attn::cuda::sm80::fp32
