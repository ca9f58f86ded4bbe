// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm80 {

template <int kHeadDim, int kWarps, int kMTiles, int kBlockN, int kBlocksPerSm, int kSlots, Rules kRules,
          unsigned kGpus, int kWarpsD = 1>
ForwardVariant forward_variant(const char* name, const TileClocks& clocks = {}) {
  using Bf16 =
      ForwardConfig<__nv_bfloat16, kHeadDim, kWarps, kMTiles, kBlockN, kBlocksPerSm, kSlots, kRules, kGpus, kWarpsD>;
  using Fp16 = ForwardConfig<__half, kHeadDim, kWarps, kMTiles, kBlockN, kBlocksPerSm, kSlots, kRules, kGpus, kWarpsD>;
  return {name,
          kHeadDim,
          Bf16::kBlockM,
          kBlockN,
          Bf16::kThreads,
          kBlocksPerSm,
          kRules,
          kGpus,
          clocks,
          Bf16::kTileBytes,
          ForwardBlock<Bf16>::KvCopy::kStep,
          {forward_kernel<Bf16>, forward_kernel<Fp16>}};
}

}  // namespace flash_attn::cuda::sm80
