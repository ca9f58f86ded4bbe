// What a task of the forward pass works on: blocks of query rows, packed tiles of keys and values, a tile of scores.
#pragma once

#include "../isa.h"
#include "../parallel.h"
#include "few_rows.h"

namespace flash_attn::cpu {
namespace {  // see isa.h

constexpr int64_t kForwardBlockM = forward_block_rows(Isa::FLASH_ATTN_ISA);
/// Of a task. On AMX it takes as long to pack a tile of keys and values as to form one block's products with it.
constexpr int64_t kMaxRowBlocks = kOnTiles ? 32 : 4;

/// Query rows [begin, begin + rows) and what the softmax knows of them.
template <typename Arithmetic>
struct RowBlock {
  typename Arithmetic::Operand* q_t;            // (head_dim / pack, ldm)
  typename Arithmetic::Acc* out_t;              // (head_dim_v, ldm)
  typename Arithmetic::Acc *row_max, *row_sum;  // (ldm)
  int64_t begin, rows;
  Range columns;
};

template <typename T>
int64_t rows_of_block(const ForwardParams& params) {
  return max(kLanes<T>, min(kForwardBlockM, round_up(params.seqlen_q, kLanes<T>)));
}

template <typename Arithmetic>
struct ForwardScratch {
  using Acc = typename Arithmetic::Acc;
  using Operand = typename Arithmetic::Operand;
  int64_t ldm, ldk, ldv;  // leading dimensions: block rows, operands of head_dim, head_dim_v
  int64_t row_blocks;     // of a task
  bool few_rows;          // k, v and p are not packed then, and these are in use:
  Acc* s_rows;            // (kFewRows, kForwardBlockN)
  Acc* out_rows;          // (kFewRows, ldv)
  Operand* k;             // (kForwardBlockN, ldk)
  Operand* v;             // (head_dim_v, kForwardBlockN), see pack_values
  Operand* v_clean;       // as v, without the values of dead columns
  Acc* s;                 // (kForwardBlockN, ldm): scores, then probabilities
  Operand* p;             // (kForwardBlockN / pack, ldm): probabilities as operands
  Acc* bias;              // (kForwardBlockN, ldm)
  uint8_t* bytes;         // (kForwardBlockN, byte_stride(ldm)): bool mask, then dropout
  Acc* factor;            // (ldm)
  uint8_t* dead;          // (kForwardBlockN)
  char* gathered;         // (kForwardBlockN, max(head_dim, head_dim_v)): rows of k or v from their pages
  RowBlock<Arithmetic> rows[kMaxRowBlocks];

  ForwardScratch(const ForwardParams& params, int64_t row_blocks, Arena& arena) : row_blocks(row_blocks) {
    constexpr int64_t kPack = Arithmetic::kPack, kN = kForwardBlockN;
    ldm = rows_of_block<Acc>(params);
    ldk = round_up((params.head_dim + kPack - 1) / kPack, kPadding<Acc>);
    ldv = round_up(params.head_dim_v, kPadding<Acc>);
    few_rows = params.seqlen_q <= kFewRows<Acc>;
    s_rows = few_rows ? arena.take<Acc>(kFewRows<Acc> * kN) : nullptr;
    out_rows = few_rows ? arena.take<Acc>(kFewRows<Acc> * ldv) : nullptr;
    const int64_t packed = few_rows ? 0 : kN;
    k = arena.take<Operand>((packed + kGemmRows) * ldk);  // a product may read rows beyond a tile that starts late
    v = arena.take<Operand>(packed / kPack * ldv);
    v_clean =
        params.mask.data != nullptr || params.window_left >= 0 ? arena.take<Operand>(packed / kPack * ldv) : nullptr;
    s = arena.take<Acc>(kN * ldm);
    p = kPack == 1 ? reinterpret_cast<Operand*>(s) : arena.take<Operand>(kN / kPack * ldm);
    bias = params.mask.data != nullptr ? arena.take<Acc>(kN * ldm) : nullptr;
    bytes = arena.take<uint8_t>(kN * byte_stride(ldm));
    factor = arena.take<Acc>(ldm);
    dead = arena.take<uint8_t>(kN);
    const int64_t row_bytes = max(params.head_dim, params.head_dim_v) * size_of(params.dtype);
    gathered = params.cache.block_table != nullptr ? arena.take<char>(kN * row_bytes) : nullptr;
    for (int64_t i = 0; i < row_blocks; ++i) {
      rows[i] = {arena.take<Operand>(ldk * ldm),
                 arena.take<Acc>(ldv * ldm),
                 arena.take<Acc>(ldm),
                 arena.take<Acc>(ldm),
                 0,
                 0,
                 {0, 0}};
    }
  }
};

}  // namespace
}  // namespace flash_attn::cpu
