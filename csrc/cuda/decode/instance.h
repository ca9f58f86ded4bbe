// Makes table entries of kernel configurations; for the files of instances/ alone.
#pragma once

#include "kernel.h"
#include "variant.h"

namespace flash_attn::cuda::decode {

template <int kHeadDim, int kBlockM, int kBlocksPerSm>
Variant variant(const char* name) {
  using Bf16 = Config<__nv_bfloat16, kHeadDim, kBlockM, kBlocksPerSm>;
  using Fp16 = Config<__half, kHeadDim, kBlockM, kBlocksPerSm>;
  return {name,
          kHeadDim,
          kBlockM,
          Bf16::kBlockN,
          Bf16::kThreads,
          kBlocksPerSm,
          Memory<Bf16>::kFixedBytes,
          Bf16::kStageBytes,
          int64_t{2} * kBlockM * (kHeadDim * 4 + 8),
          {decode_kernel<Bf16>, decode_kernel<Fp16>}};
}

}  // namespace flash_attn::cuda::decode
