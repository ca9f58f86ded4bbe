// Fragments of 16-bit elements to and from shared memory, matrices of 8x8 at a time (PTX ISA, "stmatrix", "ldmatrix").
#pragma once

#include "../../common/ptx.h"

namespace flash_attn::cuda::sm90 {

/// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
FLASH_ATTN_DEVICE void stmatrix_x4(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}

/// Two 8x8 matrices of 16-bit elements; lane l < 16 gives the address of row l % 8 of matrix l / 8.
FLASH_ATTN_DEVICE void stmatrix_x2(uint32_t row, uint32_t m0, uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(m0), "r"(m1) : "memory");
}

/// stmatrix_x4 of the transposed matrices.
FLASH_ATTN_DEVICE void stmatrix_x4_transposed(uint32_t row, const uint32_t* m) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]),
               "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

/// The way back: four matrices to registers.
FLASH_ATTN_DEVICE void ldmatrix_x4(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

/// Four transposed matrices to registers.
FLASH_ATTN_DEVICE void ldmatrix_x4_transposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

}  // namespace flash_attn::cuda::sm90
