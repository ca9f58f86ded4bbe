// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::sm80 {

template <int kHeadDim, int kWarps, int kMTiles, int kBlockN, int kSubN, int kBlocksPerSm, bool kExtended>
ForwardVariant forward_variant(const char* name) {
  using Bf16 = ForwardConfig<__nv_bfloat16, kHeadDim, kWarps, kMTiles, kBlockN, kSubN, kBlocksPerSm, kExtended>;
  using Fp16 = ForwardConfig<__half, kHeadDim, kWarps, kMTiles, kBlockN, kSubN, kBlocksPerSm, kExtended>;
  return {name,
          kHeadDim,
          Bf16::kBlockM,
          kBlockN,
          Bf16::kThreads,
          kBlocksPerSm,
          kExtended,
          kBlockN == kSubN ? 2 : 3,
          Bf16::kQueryBytes,
          Bf16::kSlotBytes,
          {forward_kernel<Bf16>, forward_kernel<Fp16>}};
}

}  // namespace flash_attn::cuda::sm80
