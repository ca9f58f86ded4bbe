// csrc/cuda/common/tiles/visibility.h for random problems, on the host: what it says of tiles and blocks is what its
// rules say of each row and column.
#include <cstdint>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>

#include "../csrc/cuda/common/tiles/visibility.h"

namespace flash_attn::cuda {
namespace {

constexpr int kBlockM = 16, kBlockN = 64;

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

struct Problem {
  ForwardParams params{};
  SequenceInfo info{};
  Band band{};

  bool sees(int row, int column) const {
    if (row >= params.seqlen_q || column >= params.seqlen_k) return false;
    const Range columns = visible_columns(params, info, row);
    return column >= columns.begin && column < columns.end;
  }
  template <typename Sees>
  static int count(int begin, int end, Sees sees) {
    int n = 0;
    for (int i = begin; i < end; ++i) n += sees(i);
    return n;
  }
  int seen(int row_begin, int row_end, int column_begin, int column_end) const {
    return count(row_begin, row_end,
                 [&](int row) { return count(column_begin, column_end, [&](int c) { return sees(row, c); }) > 0; });
  }
};

Problem random_problem(std::mt19937& generator) {
  const auto between = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); };
  Problem problem;
  ForwardParams& p = problem.params;
  p.batch = 1;
  p.seqlen_q = p.total_q = between(1, 150);
  p.seqlen_k = p.total_k = between(1, 300);
  p.causal = between(0, 1) == 0 ? Causal::kTopLeft : Causal::kBottomRight;
  p.window_left = between(0, 1) == 0 ? -1 : between(0, 200);
  p.window_right = between(0, 2) == 0 ? -1 : between(0, 1) * between(0, 200);
  problem.info = sequence_info(p, 0);
  const int diagonal = static_cast<int>(problem.info.diagonal);
  problem.band = {right_bound(static_cast<int>(p.window_right), diagonal),
                  left_bound(static_cast<int>(p.window_left), diagonal), static_cast<int>(p.seqlen_k),
                  static_cast<int>(p.seqlen_q)};
  require(problem.band.right == right_bound(p.window_right, problem.info.diagonal), "a right bound in 64 bits");
  require(problem.band.left == left_bound(p.window_left, problem.info.diagonal), "a left bound in 64 bits");
  return problem;
}

/// A tile of columns and the blocks of rows beside it.
void check_row_blocks(const Problem& problem, int n_block) {
  const ForwardParams& p = problem.params;
  const int begin = n_block * kBlockN, end = begin + kBlockN;
  const IntRange blocks = problem.band.row_blocks<kBlockM>(begin, end);
  const IntRange full = problem.band.full_row_blocks<kBlockM>(begin);
  for (int m = 0; m * kBlockM < p.seqlen_q; ++m) {
    const int row_end = std::min<int>((m + 1) * kBlockM, static_cast<int>(p.seqlen_q));
    const bool seen = problem.seen(m * kBlockM, row_end, begin, end) > 0;
    require(seen == blocks.holds(m), "blocks of rows that see a tile");
    bool all = true;
    for (int row = m * kBlockM; row < row_end; ++row) {
      for (int column = begin; column < end; ++column) all = all && problem.sees(row, column);
    }
    if (full.holds(m)) require(all, "a block that needs no mask");
    if (all && row_end == (m + 1) * kBlockM) require(full.holds(m), "a block that needs a mask");
    if (!seen) continue;
    // Tiles that add to these rows before this one, in either order.
    int left = 0, right = 0;
    for (int n = 0; n * kBlockN < p.seqlen_k; ++n) {
      const bool adds = problem.band.row_blocks<kBlockM>(n * kBlockN, (n + 1) * kBlockN).holds(m);
      left += adds && n < n_block;
      right += adds && n > n_block;
    }
    require(problem.band.tiles_left_of<kBlockN>(n_block, m * kBlockM) == left, "tiles left of one");
    require(problem.band.tiles_right_of<kBlockN>(n_block, (m + 1) * kBlockM) == right, "tiles right of one");
  }
}

/// 64 rows and the blocks of columns of a tile of them that begins with its first visible column.
void check_column_blocks(const Problem& problem, int row) {
  const ForwardParams& p = problem.params;
  const int row_end = std::min<int>(row + 64, static_cast<int>(p.seqlen_q));
  const int num_blocks = std::max<int>(1, static_cast<int>(ceil_div(p.seqlen_k, kBlockN)));
  const ColumnBlocks blocks = column_blocks<kBlockN, true>(problem.band, row, num_blocks);
  require(blocks.begin >= 0 && blocks.begin < blocks.end && blocks.end <= num_blocks,
          "no block, or more than there are");
  for (int n = 0; n < num_blocks; ++n) {
    const int begin = n * kBlockN, end = begin + kBlockN;
    if (n < blocks.begin || n >= blocks.end) require(problem.seen(row, row_end, begin, end) == 0, "a block left out");
    if (n < blocks.begin || n >= blocks.end || blocks.is_partial(n)) continue;
    for (int r = row; r < row_end; ++r) {
      for (int column = begin; column < end; ++column) require(problem.sees(r, column), "a block that needs no mask");
    }
  }
}

void check_planners(const Problem& problem) {
  const ForwardParams& p = problem.params;
  bool first = true;
  int64_t tiles = 0;
  for (int row = 0; row < p.seqlen_q; ++row) first = first && problem.sees(row, 0);
  require(p.window_left < 0 ? every_row_sees_first_key(p) == first : !every_row_sees_first_key(p),
          "who sees the first key");
  for (int row = 0; row < p.seqlen_q; row += kBlockM) {
    for (int column = 0; column < p.seqlen_k; column += kBlockN) {
      tiles += problem.seen(row, row + kBlockM, column, column + kBlockN) > 0;
    }
  }
  require(num_visible_tiles(p, kBlockM, kBlockN) == tiles, "so many tiles");
}

}  // namespace
}  // namespace flash_attn::cuda

/// What is wrong, and with which problem; empty if nothing.
extern "C" __attribute__((visibility("default"))) const char* check_visibility(int problems, unsigned seed) {
  using namespace flash_attn::cuda;
  static std::string wrong;
  std::mt19937 generator(seed);
  for (int i = 0; i < problems; ++i) {
    const Problem problem = random_problem(generator);
    const auto& p = problem.params;
    try {
      for (int n = 0; n * kBlockN < p.seqlen_k; ++n) check_row_blocks(problem, n);
      for (int row = 0; row < p.seqlen_q; row += 64) check_column_blocks(problem, row);
      check_planners(problem);
    } catch (const std::exception& error) {
      char text[160];
      std::snprintf(text, sizeof text, ": %d x %d rows, window (%d, %d), diagonal %d", int(p.seqlen_q), int(p.seqlen_k),
                    int(p.window_left), int(p.window_right), int(problem.info.diagonal));
      wrong = error.what() + std::string(text);
      return wrong.c_str();
    }
  }
  return "";
}
