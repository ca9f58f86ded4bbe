// csrc/cuda/common/tiles/sequence_blocks.h for random lengths, on the host: the list has every block with rows once, in
// the order that it says, and no more places than the lengths' sum allows, whatever the bound on one of them.
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cuda/common/tiles/sequence_blocks.h"

namespace flash_attn::cuda {
namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

struct Lengths {
  std::vector<int32_t> starts;
  int64_t total, longest = 0;

  explicit Lengths(std::mt19937& generator) {
    const auto between = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); };
    const int batch = between(1, 40), most = between(0, 2) == 0 ? 4 : 300;
    starts.push_back(between(0, 3) == 0 ? between(0, 200) : 0);  // rows before the first sequence
    for (int b = 0; b < batch; ++b) {
      const int length = between(0, 4) == 0 ? 0 : between(0, 7) == 0 ? 64 * between(1, 4) : between(1, most);
      longest = std::max<int64_t>(longest, length);
      starts.push_back(starts.back() + length);
    }
    total = starts.back() + (between(0, 1) == 0 ? 0 : between(0, 200));  // rows behind the last
  }
  int64_t batch() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t blocks(int64_t b, int block) const { return ceil_div(starts[b + 1] - starts[b], block); }
};

void check_list(const Lengths& lengths, int64_t bound, int block, int64_t num_heads) {
  const int64_t batch = lengths.batch();
  const SequenceBlocks list(lengths.starts.data(), batch, lengths.total, bound, block);
  require(list.count() <= lengths.total / block + batch, "more places than rows and sequences");
  require(list.count() <= batch * ceil_div(bound, block), "more places than the bound allows");
  std::vector<std::vector<int>> seen(batch), seen_of_heads(batch * num_heads);
  for (int64_t b = 0; b < batch; ++b) {
    seen[b].resize(lengths.blocks(b, block));
    for (int64_t h = 0; h < num_heads; ++h) seen_of_heads[b * num_heads + h].resize(lengths.blocks(b, block));
  }
  const auto visit = [](std::vector<int>& blocks, int64_t index) {
    if (index >= 0 && index < static_cast<int64_t>(blocks.size())) ++blocks[index];
  };
  for (int64_t n = 0; n < list.count(); ++n) {
    const SequenceBlocks::Place place = list.find(static_cast<uint32_t>(n));
    require(place.batch >= 0 && place.batch < batch, "no such sequence");
    visit(seen[place.batch], place.index);
  }
  for (const bool descending : {false, true}) {
    SequenceBlocks::PlaceOfHead last{0, 0, 0};
    for (int64_t n = 0; n < list.count() * num_heads; ++n) {
      const SequenceBlocks::PlaceOfHead place = list.find_of_heads(n, num_heads, descending);
      require(place.batch >= 0 && place.batch < batch && place.head >= 0 && place.head < num_heads, "no such head");
      if (place.index >= 0) {
        const int64_t head = place.batch * num_heads + place.head, last_head = last.batch * num_heads + last.head;
        require(head >= last_head, "a head after the next one");
        const bool follows = descending ? place.index < last.index : place.index > last.index;
        require(head > last_head || n == 0 || follows || last.index < 0, "a head's blocks out of order");
        visit(seen_of_heads[head], place.index);
      }
      last = place;
    }
  }
  for (const auto& blocks : seen) {
    for (const int times : blocks) require(times == 1, "a block that is not visited once");
  }
  for (const auto& blocks : seen_of_heads) {
    for (const int times : blocks) require(times == 2, "a head's block that is not visited once in each order");
  }
}

}  // namespace
}  // namespace flash_attn::cuda

/// What is wrong, and with which problem; empty if nothing.
extern "C" __attribute__((visibility("default"))) const char* check_sequence_blocks(int problems, unsigned seed) {
  using namespace flash_attn::cuda;
  static std::string wrong;
  wrong.clear();
  std::mt19937 generator(seed);
  for (int i = 0; i < problems; ++i) {
    const Lengths lengths(generator);
    for (const int64_t bound : {lengths.longest, 2 * lengths.longest, lengths.total, int64_t{1} << 20}) {
      for (const int block : {16, 64, 96}) {
        try {
          check_list(lengths, bound, block, 1 + i % 3);
        } catch (const std::exception& error) {
          wrong = std::string(error.what()) + " (problem " + std::to_string(i) + ", bound " + std::to_string(bound) +
                  ", block " + std::to_string(block) + ")";
          return wrong.c_str();
        }
      }
    }
  }
  return wrong.c_str();
}

/// Places in the list of sequences of `length` rows each.
extern "C" __attribute__((visibility("default"))) int64_t count_blocks(int64_t batch, int64_t length, int64_t bound,
                                                                       int block) {
  const std::vector<int32_t> starts(batch + 1);  // only that there are some
  return flash_attn::cuda::SequenceBlocks(starts.data(), batch, batch * length, bound, block).count();
}
