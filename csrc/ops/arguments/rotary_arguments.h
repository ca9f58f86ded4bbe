// The arguments of the rotary ops, and their checks.
#pragma once

#include <optional>

#include "../../host_device.h"
#include "../../row_copies.h"
#include "../tensor_info.h"

namespace flash_attn {

/// The arguments of flash_attn::rotary and flash_attn::rotary_; flash_attn/torch_op/rotary.py has its twin.
struct RotaryArguments {
  TensorInfo x;                          // (batch, seqlen, heads, head_dim), with cu_seqlens (total, heads, head_dim)
  TensorInfo cos, sin;                   // (positions, rotary_dim / 2)
  std::optional<TensorInfo> offsets;     // (batch): position of each sequence's first row, beside `offset`
  std::optional<TensorInfo> cu_seqlens;  // (batch + 1)
  int64_t offset = 0;
  bool interleaved = false, conjugate = false;

  template <typename Visit>
  constexpr void for_each_tensor(const Visit& visit) {
    visit("x", x);
    visit("cos", cos);
    visit("sin", sin);
    visit("offsets", offsets);
    visit("cu_seqlens", cu_seqlens);
  }

  template <typename Visit>
  constexpr void for_each_option(const Visit& visit) {
    visit("offset", "SymInt", offset);
    visit("interleaved", "bool", interleaved);
    visit("conjugate", "bool", conjugate);
  }
};

/// Checks the tables for turning x.
Rotary make_rotary(const TensorInfo& cos, const std::optional<TensorInfo>& sin, bool interleaved, const TensorInfo& x);

/// Checks everything and fills all but where the rows go. Positions are checked too where they are in host memory and
/// `read_values` is true.
FLASH_ATTN_EXPORT RowCopies make_rotary_params(const RotaryArguments& arguments, bool read_values = true);

}  // namespace flash_attn
