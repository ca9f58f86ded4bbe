// How the CTAs of a cluster put together a tile of which each has a part; see ClusterStorage.
#pragma once

#include "../hopper/barriers.h"
#include "../hopper/peer_stores.h"
#include "config.h"

namespace flash_attn::cuda::sm90::forward {

/// Adds what has come from the others to what this warp has of its rows, and writes them.
template <typename Config, typename AnyConsumer>
FLASH_ATTN_DEVICE void add_parts(AnyConsumer& c, const Tile& tile, int row, int first_slot, const float (&own_sum)[2]) {
  const auto& storage = static_cast<const ClusterStorage<Config>&>(c.shared);
  const int last_slot = first_slot + c.params.schedule.num_splits - 2;
  const auto statistics = [&](int slot, int r) { return storage.statistics[slot][c.lane / 4 + 8 * r]; };
  float largest[2] = {c.softmax.row_max[0], c.softmax.row_max[1]};
  for (int slot = first_slot; slot <= last_slot; ++slot) {
    largest[0] = fmaxf(largest[0], statistics(slot, 0).x);
    largest[1] = fmaxf(largest[1], statistics(slot, 1).x);
  }
  // A part that shows a row nothing has weight 0, and is selected, not multiplied: its O may be NaN there.
  const auto weight = [&](int r, float row_max, float row_sum) {
    return row_sum == 0.f ? 0.f : fast_exp2((row_max - largest[r]) * c.params.to_log2);
  };
  float sum[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float own = weight(r, c.softmax.row_max[r], own_sum[r]);
    sum[r] = own * own_sum[r];
#pragma unroll
    for (int i = 2 * r; i < Config::kHeadDimV / 2; i += 4) {
      c.out[i] = own_sum[r] == 0.f ? 0.f : c.out[i] * own;
      c.out[i + 1] = own_sum[r] == 0.f ? 0.f : c.out[i + 1] * own;
    }
  }
#pragma unroll 1
  for (int slot = first_slot; slot <= last_slot; ++slot) {
    const float2 of_part[2] = {statistics(slot, 0), statistics(slot, 1)};
    const float scale[2] = {weight(0, of_part[0].x, of_part[0].y), weight(1, of_part[1].x, of_part[1].y)};
    sum[0] += scale[0] * of_part[0].y;
    sum[1] += scale[1] * of_part[1].y;
    const uint32_t from = shared_address(storage.part(slot) + 4 * c.lane);
#pragma unroll
    for (int i = 0; i < Config::kHeadDimV / 2; i += 4) {
      float o[4];
      load_shared(from + 128 * i, o);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (of_part[j / 2].y != 0.f) c.out[i + j] = fmaf(scale[j / 2], o[j], c.out[i + j]);
      }
    }
  }
  c.store_sums(tile, row, largest, [&](int r) { return sum[r]; });
}

/// By all consumers of the cluster; `row` is the warp's first. Each warp's rows are put together by the same warp of
/// one of the CTAs, to which the others send what they have.
template <typename Config, typename AnyConsumer>
FLASH_ATTN_DEVICE void combine_parts(AnyConsumer& c, const Tile& tile, int row) {
  auto& storage = static_cast<ClusterStorage<Config>&>(c.shared);
  const int num_parts = c.params.schedule.num_splits, part = cluster_rank();
  const int index = 4 * c.warpgroup + c.warp, writer = index % num_parts;
  const int first_slot = index / num_parts * (num_parts - 1);
  const bool has_rows = row < tile.num_rows;
  uint64_t* const full = &storage.parts_full[index];
  if (has_rows && writer == part && c.lane == 0) {
    mbarrier_arrive_expect(full, (num_parts - 1) * (Config::kWarpBytesOfPart + 16 * sizeof(float2)));
  }
  cluster_wait();                                        // all CTAs have begun
  named_barrier_sync(kParts, 128 * Config::kConsumers);  // K and V have been read for the last time
  if (threadIdx.x < num_parts && threadIdx.x != part) {
    mbarrier_arrive_peer(peer_address(&storage.peers_ready, threadIdx.x));
  }
  const float sum[2] = {quad_sum(c.softmax.row_sum[0]), quad_sum(c.softmax.row_sum[1])};
  mbarrier_wait(&storage.peers_ready, 0);  // also in a CTA that sends nothing: it must not end before they arrive
  if (!has_rows) return;
  if (writer != part) {
    const int slot = first_slot + part - (part > writer);
    const uint32_t barrier = peer_address(full, writer);
    const uint32_t to = peer_address(storage.part(slot) + 4 * c.lane, writer);
#pragma unroll
    for (int i = 0; i < Config::kHeadDimV / 8; ++i) send_to_peer(to + 512 * i, c.out + 4 * i, barrier);
    if (c.lane % 4 == 0) {
      const uint32_t statistics = peer_address(storage.statistics[slot] + c.lane / 4, writer);
      send_to_peer(statistics, float2{c.softmax.row_max[0], sum[0]}, barrier);
      send_to_peer(statistics + 8 * sizeof(float2), float2{c.softmax.row_max[1], sum[1]}, barrier);
    }
  } else {
    mbarrier_wait(full, 0);
    add_parts<Config>(c, tile, row, first_slot, sum);
  }
}

}  // namespace flash_attn::cuda::sm90::forward
