// Products of 32 columns, for blocks of few keys; all else as in wgmma.h.
#pragma once

#include "wgmma.h"

namespace flash_attn::cuda::sm90 {

#define SM90_REGISTERS_16 SM90_REGISTERS() ", %10, %11, %12, %13, %14, %15"
#define SM90_ACCUMULATORS_16 \
  SM90_ACCUMULATORS(), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), "+f"(acc[14]), "+f"(acc[15])

template <typename Element>
struct WgmmaNarrow;
template <>
struct WgmmaNarrow<__nv_bfloat16> {
  SM90_WGMMA("bf16", 32, 16, 16, 17, 18, 19, 20, 21, 22, 23)
};
template <>
struct WgmmaNarrow<__half> {
  SM90_WGMMA("f16", 32, 16, 16, 17, 18, 19, 20, 21, 22, 23)
};

}  // namespace flash_attn::cuda::sm90
