#include "backward_launch.h"

namespace flash_attn::sm90 {
namespace {

struct Shape : BackwardShape {};

struct Short : Shape {
  static constexpr int kStages = 3;
  static constexpr bool kDqWarps = false;
};

struct Fused : Shape {
  static constexpr bool kDqWarps = false, kFusedDq = true;
};

}  // namespace

const BackwardVariant kBackwardD128 = backward_variant<Shape>("wgmma d128 64x128");
const BackwardVariant kBackwardD128Short = backward_variant<Short>("wgmma d128 64x128 3 stages");
const BackwardVariant kBackwardD128Fused = backward_variant<Fused>("wgmma d128 64x128 fused dq");

}  // namespace flash_attn::sm90
