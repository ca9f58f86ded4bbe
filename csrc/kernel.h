// What a kernel family offers to the dispatcher. A family is chosen by asking each in turn whether it refuses the
// problem; the reasons of those that do are what flash_attn.explain() prints.
#pragma once

#include <cstdint>

#include "params.h"

namespace flash_attn {

/// Facts of the device that planning depends on. All zero for the CPU.
struct DeviceInfo {
  int compute_capability = 0;  // 90 for Hopper
  int num_sms = 0;
  int shared_memory_per_block = 0;  // bytes, with opt-in
  int64_t l2_bytes = 0;
};

/// What a planner decided beyond the variant, for people, tests and measurements: a number, or a word.
struct Decision {
  const char* name;
  int64_t number;
  const char* word;  // null: the number
};

/// How a kernel would run a problem.
struct Plan {
  const char* kernel = "";       // the variant, for people: "simt fp32 d64"
  int block_m = 0, block_n = 0;  // query rows and key rows of a tile
  int64_t workspace_bytes = 0;   // scratch the caller allocates; contents undefined on entry

  // The first num_decisions of them. No container: plans are made for each call.
  static constexpr int kMaxDecisions = 12;
  Decision decisions[kMaxDecisions] = {};
  int num_decisions = 0;
  void decide(const char* name, int64_t number) { decisions[num_decisions++] = {name, number, nullptr}; }
  void decide(const char* name, const char* word) { decisions[num_decisions++] = {name, 0, word}; }
};

/// Params is ForwardParams or BackwardParams.
template <typename Params>
struct Kernel {
  const char* family;  // "cpu", "universal", "sm80", "sm90"
  /// Why this family can't run the problem, as a clause ("head_dim 320 is over 256"); null if it can.
  const char* (*refuses)(const Params&, const DeviceInfo&);
  Plan (*plan)(const Params&, const DeviceInfo&);
  /// `stream` is a cudaStream_t, unused on the CPU. Throws std::runtime_error when the launch fails.
  void (*launch)(const Params&, const DeviceInfo&, void* stream);
};

using ForwardKernel = Kernel<ForwardParams>;
using BackwardKernel = Kernel<BackwardParams>;

}  // namespace flash_attn
