// What the kernels whose warpgroups take turns in products have in common. One warpgroup's products, of which the
// tensor cores have enough for themselves, run while others compute; without an order all would issue products at a
// time, and then all compute.
//
// Beside the kConsumers warpgroups that compute there is one whose four warps copy, one for each slot of shared memory.
#pragma once

#include "../hopper/barriers.h"
#include "../hopper/budgets.h"
#include "products.h"

namespace flash_attn::cuda::sm90::fp32 {

constexpr int kTurnSlots = 4;

/// Of the slots: something has arrived, all consumers are done with it.
struct SlotBarriers {
  uint64_t full[kTurnSlots], empty[kTurnSlots];
};

/// kReleasingLanes: of a warp, how many say that it is done with a slot. One is enough: between the last read of a lane
/// and the release stands a barrier of the consumer. Where all do, racecheck sees that too.
template <int kConsumers_, int kProducerRegisters_, int kReleasingLanes = 1>
struct Turns {
  static constexpr int kConsumers = kConsumers_;
  static_assert(kConsumers == 2 || kConsumers == 3);
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Of a thread. At launch all have the same number.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kProducerRegisters_;
  static constexpr int kConsumerRegisters = (kRegisters * (kConsumers + 1) - kProducerRegisters) / kConsumers / 8 * 8;
  // Named barriers, one for each consumer.
  static constexpr int kTurn = 1, kOwn = 1 + kConsumers;

  /// By one thread; a barrier of the block comes behind it.
  SM80_DEVICE static void init(SlotBarriers& barriers) {
    for (int i = 0; i < kTurnSlots; ++i) {
      mbarrier_init(&barriers.full[i], 32);
      mbarrier_init(&barriers.empty[i], 4 * kConsumers * kReleasingLanes);
    }
  }

  /// By a warp: what it has copied to the slot, and written there, is there for products and for reads.
  SM80_DEVICE static void publish(SlotBarriers& barriers, int slot) {
    sm80::cp_async_commit();
    sm80::cp_async_wait<0>();
    async_proxy_fence();
    mbarrier_arrive(&barriers.full[slot]);
  }
  /// By all threads of a consumer: the same for it alone.
  SM80_DEVICE static void publish_own(int consumer) {
    sm80::cp_async_commit();
    sm80::cp_async_wait<0>();
    async_proxy_fence();
    named_barrier_sync(kOwn + consumer, 128);
  }
  /// By a warp, behind its wait for the products that read the slot, and a barrier of the consumer for other reads.
  /// Where all lanes release, ptxas would spill without a condition.
  SM80_DEVICE static void release(SlotBarriers& barriers, int slot) {
    if (lane_id() < kReleasingLanes) mbarrier_arrive(&barriers.empty[slot]);
  }

  SM80_DEVICE static void begin(int consumer) { named_barrier_sync(kTurn + consumer, 256); }
  SM80_DEVICE static void end(int consumer) {
    named_barrier_arrive(kTurn + (consumer + 1 == kConsumers ? 0 : consumer + 1), 256);
  }
  /// Before all turns, of which the first one is consumer 0's.
  SM80_DEVICE static void open(int consumer) {
    if (consumer == kConsumers - 1) end(consumer);
  }
};

}  // namespace flash_attn::cuda::sm90::fp32
