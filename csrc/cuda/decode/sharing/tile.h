// One tile of a sequence: its rows, and which keys they see. Whoever loads keys works it out, once, and leaves it in
// shared memory for those who use them.
#pragma once

#include "units.h"

namespace flash_attn::cuda::decode {

struct TileInfo {
  int b, head_k;
  int first_row;             // packed, of the tile's own
  int rows;                  // packed rows that exist, at most kBlockM
  int q_row;                 // of the sequence, in q and out
  int seqlen_q;              // rows of it from here on see nothing, and get zeros
  int right, left;           // query row i sees keys [max(0, i + left), min(seqlen_k, i + right + 1))
  int seqlen_k, diagonal;    // as in Sequence
  int begin, end;            // keys that some row sees
  int full_begin, full_end;  // keys that all rows see
  int first_unit, units;     // in the list of all
};

/// One block of a tile, in a stage.
struct BlockInfo {
  int first_key;
  int slot;      // of the tile, in shared memory
  bool ends;     // the tile, or what this CTA has of it
  bool last;     // of the CTA's blocks
  bool partial;  // some row does not see some key
};

template <typename C>
FLASH_ATTN_DEVICE TileInfo tile_info(const DecodeParams& params, const Unit& unit) {
  constexpr int kFar = 1 << 30;
  const ForwardParams& p = params.problem;
  const Sequence& s = unit.sequence;
  TileInfo t;
  t.b = unit.b;
  t.head_k = unit.tile / s.tiles;
  t.first_row = (unit.tile - t.head_k * s.tiles) * C::kBlockM;
  t.rows = min(C::kBlockM, s.rows_q * int(params.group.value) - t.first_row);
  t.q_row = s.q_row, t.seqlen_q = s.seqlen_q;
  t.seqlen_k = s.seqlen_k, t.diagonal = s.diagonal;
  t.right = p.window_right < 0 ? kFar : s.diagonal + int(p.window_right);
  t.left = p.window_left < 0 ? -kFar : s.diagonal - int(p.window_left);
  const int first = params.group.divide(t.first_row);
  const int last = min(params.group.divide(t.first_row + t.rows - 1), s.seqlen_q - 1);
  t.begin = max(0, first + t.left);
  t.end = first > last ? 0 : min(s.seqlen_k, last + t.right + 1);
  t.full_begin = max(0, last + t.left);
  t.full_end = min(s.seqlen_k, first + t.right + 1);
  t.first_unit = unit.index - unit.block, t.units = s.blocks;
  return t;
}

}  // namespace flash_attn::cuda::decode
