#pragma once

// Rules that CPU and CUDA kernels share are written once, as functions for both.
#ifdef __CUDACC__
#define FLASH_ATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLASH_ATTN_HOST_DEVICE inline
#endif
