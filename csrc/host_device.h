#pragma once

// Rules that CPU and CUDA kernels share are written once, as functions for both.
#ifdef __CUDACC__
#define FLASH_ATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels compile these functions for several instruction sets, and the linker would keep one
// copy for all.
#define FLASH_ATTN_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Seen from outside the op library, by the introspection module; everything else is hidden.
#define FLASH_ATTN_EXPORT __attribute__((visibility("default")))
