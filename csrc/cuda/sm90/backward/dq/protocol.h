// How dQ of a query block, to which all tiles of a head add, comes together.
#pragma once

namespace flash_attn::cuda::sm90::backward {

/// How a tile's part of it leaves the CTA: compiled in.
enum class DqPath {
  kWarp,       // through shared memory and a warp that stores and adds it in bulk (dq/adder.h)
  kRegisters,  // from the consumers' registers (dq/turns.h)
  kOneCta,     // not at all: a CTA has all tiles of a head, a thread adds up what it computes, the last tile writes dq
};

/// How tiles share dq_accum: chosen for each problem.
enum class DqProtocol : int {
  kUnshared,     // DqPath::kOneCta
  kZeroed,       // it is 0 at first: all add and nobody waits; there are no counters
  kFirstStores,  // as they come: the first stores, the others wait for that and add. Counters are claim_block()'s
                 // states
  kOrdered,      // in a fixed order, so that the sum is the same every time: the first stores, each of the others waits
                 // until those before it have added. Counters say how many have: tiles_before()
};

/// dq_accum holds a block as 64 x 64 tiles, by rows then by columns, each in the order of an accumulator: (warp, 8
/// columns, lane, 4). So a warp adds 512 contiguous bytes at a time.
constexpr int kDqTile = 64 * 64;

/// Half a tile of kDqTile, the unit in which the main kernel turns dq_accum to dq.
constexpr int kDqPieceRows = 32, kDqPiece = kDqPieceRows * 64;

/// The counters of a query block, 0 at first.
union BlockCounters {
  int added[2];  // kOrdered: how many tiles have added; of a tile's CTAs, or of its dQ warps, each has its own
  int claim;     // kFirstStores: a state of claim_block()
};

}  // namespace flash_attn::cuda::sm90::backward
